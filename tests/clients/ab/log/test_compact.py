"""Raw log to Parquet: the join, deduplication, days, retention, damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from datetime import date
from pathlib import Path

import pyarrow.compute as pc
import pytest

from clients.ab.log import compaction
from clients.ab.log.compaction import Summary, compact
from clients.ab.log.lines import DAY_MICROSECONDS, encode
from clients.ab.log.reader import log_files, read_lines
from clients.ab.log.records import RECORDS, complete
from clients.ab.log.retention import remove_old_days
from clients.ab_compact import Config, main
from ranking.errors import InputError
from ranking.query_engine import QueryEngineSettings
from ranking.schema import read_table

ROOT = Path(__file__).parents[4]
DAY = 20_000  # 2024-10-04
NOON = DAY * DAY_MICROSECONDS + DAY_MICROSECONDS // 2


def exposure(request_id: str, logged: int = NOON, **changes) -> dict:
    return {
        "type": "exposure", "logged": logged, "request_id": request_id, "user_id": "u1", "experiment": "exp",
        "arm": "student",
        "served_by": "student", "fallback": "", "model_version": "1", "latency_ms": 12.5, "query": "q",
        "query_length": 1,
        "platform": "ios", "segments": "{}", "forced": False, "documents": ["a", "b", "c"], "scores": [3.0, 2.0, -1.0],
        "teams": [], "title": ["ta", "tb", "tc"], "summary": ["sa", "sb", "sc"], "config": "f1", **changes,
    }  # fmt: skip


def event(request_id: str, doc_id: str, kind: str = "click", dwell: float = 0.0, logged: int = NOON + 5) -> dict:
    return {
        "type": "event",
        "logged": logged,
        "request_id": request_id,
        "doc_id": doc_id,
        "event": kind,
        "dwell_seconds": dwell,
        "timestamp": None,
    }


def write_log(folder: Path, records: list[dict], tail: bytes = b"", name: str = "2024-10-04T120000.000000-1-1") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.ablog"
    path.write_bytes(b"".join(map(encode, records)) + tail)
    return path


def compact_again(tmp_path: Path) -> Summary:
    return compact(tmp_path / "log", tmp_path / "out", QueryEngineSettings())


def compacted(tmp_path: Path, records: list[dict]) -> Summary:
    write_log(tmp_path / "log", records)
    return compact_again(tmp_path)


def page(tmp_path: Path, day: str = "2024-10-04") -> list[dict]:
    return read_table(tmp_path / "out/exposures" / f"{day}.parquet", "exposures").to_pylist()


def test_clicks_and_dwell_meet_their_page(tmp_path):
    summary = compacted(
        tmp_path,
        [
            exposure("r1"),
            exposure("r2", user_id="u2", arm="baseline"),
            event("r1", "c"),
            event("r1", "a"),
            event("r1", "c", "dwell", 4.0),
            event("r1", "c", "dwell", 30.0),
            event("r1", "c", "dwell", 9.0),
        ],
    )
    first, second = page(tmp_path)
    assert (first["clicks"], first["clicked_positions"], first["dwell_seconds"]) == (2, [1, 3], 30.0)
    assert (second["clicks"], second["clicked_positions"], second["dwell_seconds"]) == (0, [], 0.0)
    assert first["timestamp"].isoformat() == "2024-10-04T12:00:00+00:00"
    assert first["scores"] == [3.0, 2.0, -1.0]
    rows = read_table(tmp_path / "out/events/2024-10-04.parquet", "events").to_pylist()
    assert [(r["request_id"], r["doc_id"], r["position"], r["clicked"], r["dwell_seconds"]) for r in rows] == [
        ("r1", "a", 1, True, 0.0), ("r1", "b", 2, False, 0.0), ("r1", "c", 3, True, 30.0),
        ("r2", "a", 1, False, 0.0), ("r2", "b", 2, False, 0.0), ("r2", "c", 3, False, 0.0),
    ]  # fmt: skip
    assert (rows[1]["title"], rows[1]["summary"], rows[3]["arm"]) == ("tb", "sb", "baseline")
    assert (summary.exposures, summary.events, summary.events_orphaned) == (2, 5, 0)
    assert summary.rows_written == {"exposures": 2, "events": 6}


def test_a_repeated_request_keeps_the_later_exposure_and_counts_the_other(tmp_path):
    records = [exposure("r1", fallback="timeout", documents=["b", "a", "c"]), exposure("r1", NOON + 9), exposure("r2")]
    summary = compacted(tmp_path, [*records, event("r1", "a")])
    kept = {r["request_id"]: r for r in page(tmp_path)}
    assert len(kept) == 2 and kept["r1"]["fallback"] == "" and kept["r1"]["clicked_positions"] == [1]
    assert (summary.exposures, summary.exposures_repeated) == (2, 1)


def test_events_without_a_page_and_repeated_events_are_counted_not_joined(tmp_path):
    records = [exposure("r1"), event("r1", "a"), event("r1", "a"), event("r1", "zz"), event("nowhere", "a")]
    summary = compacted(tmp_path, records)
    assert page(tmp_path)[0]["clicks"] == 1
    assert (summary.events, summary.events_orphaned) == (2, 2)


def test_a_dwell_is_a_click_and_is_counted(tmp_path):
    summary = compacted(tmp_path, [exposure("r1"), event("r1", "b", "dwell", 7.0)])
    assert (page(tmp_path)[0]["clicks"], page(tmp_path)[0]["dwell_seconds"]) == (1, 7.0)
    assert summary.dwells_without_click == 1


def test_a_click_after_midnight_belongs_to_the_day_of_the_page(tmp_path):
    night = (DAY + 1) * DAY_MICROSECONDS
    write_log(tmp_path / "log", [exposure("r1", night - 1)])
    write_log(tmp_path / "log", [event("r1", "a", logged=night + 10), exposure("r2", night)], name="2024-10-05T0-1-1")
    summary = compact_again(tmp_path)
    assert summary.days == ["2024-10-04", "2024-10-05"]
    assert page(tmp_path, "2024-10-04")[0]["clicks"] == 1
    assert [r["request_id"] for r in page(tmp_path, "2024-10-05")] == ["r2"]


def test_compacting_again_gives_the_same_files(tmp_path):
    records = [exposure(f"r{i}") for i in range(50)] + [event(f"r{i}", "a") for i in range(0, 50, 3)]
    compacted(tmp_path, records)
    before = page(tmp_path)
    compact_again(tmp_path)
    assert page(tmp_path) == before
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("bound", ["BLOCK_BYTES", "BLOCK_RECORDS"])
def test_small_blocks_give_the_same_rows_as_one(tmp_path, monkeypatch, bound):
    """Seen: a block was bounded by records alone, and some hundred pages of megabytes filled the memory."""
    records = []
    for i in range(60):
        records += [
            exposure(f"r{i % 50}", NOON + i % 7, query=f"q{i}"),
            event(f"r{i}", "a"),
            exposure(f"bad{i}", query=""),
        ]
    one = compacted(tmp_path, records)
    names = ("exposures", "events")
    whole = [(tmp_path / "out" / name / "2024-10-04.parquet").read_bytes() for name in names]
    rejects = (tmp_path / "out/rejects.jsonl").read_text()
    pieces = []
    monkeypatch.setattr(compaction, bound, 2000 if bound == "BLOCK_BYTES" else 3)
    monkeypatch.setattr(compaction.Quarantine, "sound", counted(compaction.Quarantine.sound, pieces))
    assert compact_again(tmp_path) == one and len(pieces) > 30 and max(pieces) <= 8
    assert [(tmp_path / "out" / name / "2024-10-04.parquet").read_bytes() for name in names] == whole
    assert sorted((tmp_path / "out/rejects.jsonl").read_text().splitlines()) == sorted(rejects.splitlines())


def counted(sound, pieces: list[int]):
    def counting(quarantine, kind, lines):
        pieces.append(len(lines))
        return sound(quarantine, kind, lines)

    return counting


def test_a_torn_tail_and_damage_are_counted_and_the_rest_is_kept(tmp_path):
    path = write_log(tmp_path / "log", [exposure("r1")], tail=b"00000000 {}\n" + encode(exposure("r2"))[:100])
    main(Config(tmp_path / "log", tmp_path / "out"))
    summary = json.loads((tmp_path / "out/compact.json").read_text())
    assert (summary["exposures"], summary["torn_tails"], summary["damaged"]) == (1, 1, [f"{path}:2"])


def test_a_raw_file_that_another_run_removes_is_one_clear_line(tmp_path, monkeypatch):
    """Seen: a FileNotFoundError with its stack, when two runs with --retain-days met."""
    paths = [write_log(tmp_path / "log", [exposure(name)], name=f"2024-10-0{n}T0-1-1") for n, name in enumerate("abc")]

    def lines_while_another_removes(path, counts):
        yield from read_lines(path, counts)
        paths[1].unlink(missing_ok=True)

    monkeypatch.setattr(compaction, "read_lines", lines_while_another_removes)
    with pytest.raises(InputError, match=r"2024-10-01T0-1-1\.ablog: removed while the log was being read"):
        compact_again(tmp_path)
    assert not list((tmp_path / "out").rglob("*.parquet"))
    monkeypatch.setattr(compaction, "log_files", lambda folder: [*log_files(folder), tmp_path / "gone.ablog"])
    with pytest.raises(InputError, match=r"gone\.ablog: removed"):
        compact_again(tmp_path)


def test_links_pipes_and_folders_in_the_log_are_left_out_and_named(tmp_path, caplog):
    """Seen: a folder of a log file's name ended every compaction, and a pipe held it for ever."""
    log = tmp_path / "log"
    write_log(log, [exposure("r1")])
    write_log(tmp_path / "elsewhere", [exposure("r2")])
    (log / "2024-10-04T130000-1-2.ablog").symlink_to(next((tmp_path / "elsewhere").iterdir()))
    (log / "2024-10-04T140000-1-3.ablog").mkdir()
    os.mkfifo(log / "2024-10-04T150000-1-4.ablog")
    assert compact_again(tmp_path).exposures == 1
    assert sum("no ordinary file" in record.message for record in caplog.records) >= 3
    remove_old_days(log, tmp_path / "out", 1, date(2030, 1, 1))
    assert (tmp_path / "elsewhere" / "2024-10-04T120000.000000-1-1.ablog").is_file()


def test_pages_without_text_or_scores_and_interleaved_pages_pass(tmp_path):
    bare = exposure("r1", served_by="incoming", scores=[], model_version="", query="(dropped)")
    del bare["title"], bare["summary"]
    mixed = exposure("r2", served_by="interleaved", teams=["student", "baseline", "student"], experiment="", arm="")
    compacted(tmp_path, [bare, mixed])
    assert [r["teams"] for r in page(tmp_path)] == [[], ["student", "baseline", "student"]]
    events = read_table(tmp_path / "out/events/2024-10-04.parquet", "events")
    assert pc.sum(pc.equal(events["title"], "")).as_py() == 3


def test_shadows_definitions_and_ramps_are_written(tmp_path):
    shadow = {
        k: v
        for k, v in exposure("r1").items()
        if k in ("logged", "request_id", "experiment", "arm", "scores", "documents")
    }
    compacted(
        tmp_path,
        [
            exposure("r1"),
            {"type": "config", "logged": NOON, "fingerprint": "f1", "definition": {"name": "exp"}},
            {"type": "ramp", "logged": NOON, "experiment": "exp", "arm": "student", "reason": "p99"}
            | {"before": 1, "after": 0.5},
            {**shadow, "type": "shadow", "model": "baseline", "failure": "", "latency_ms": 3.0},
        ],
    )  # fmt: skip
    assert read_table(tmp_path / "out/shadows/2024-10-04.parquet", "shadows")["model"].to_pylist() == ["baseline"]
    assert json.loads((tmp_path / "out/experiments.json").read_text())["f1"]["definition"] == {"name": "exp"}
    (ramp,) = json.loads((tmp_path / "out/ramps.json").read_text()).values()
    assert ramp == {"experiment": "exp", "arm": "student", "reason": "p99", "before": 1, "after": 0.5}


def test_retention_removes_whole_old_days_and_never_rewrites_them(tmp_path):
    folders = (tmp_path / "log", tmp_path / "out")
    old = write_log(tmp_path / "log", [exposure("r1")])
    new = write_log(
        tmp_path / "log", [exposure("r2", NOON + DAY_MICROSECONDS), event("r1", "a")], name="2024-10-05T0-1-1"
    )
    compact_again(tmp_path)
    kept = (tmp_path / "out/exposures/2024-10-05.parquet").read_bytes()
    assert remove_old_days(*folders, 2, date(2024, 10, 6)) == []
    removed = remove_old_days(*folders, 2, date(2024, 10, 7))
    assert len(removed) == 3 and not old.exists() and new.exists()
    assert not (tmp_path / "out/exposures/2024-10-04.parquet").exists()
    summary = compact_again(tmp_path)
    assert summary.days == ["2024-10-05"] and summary.events_orphaned == 1
    assert (tmp_path / "out/exposures/2024-10-05.parquet").read_bytes() == kept


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"query": "\u200b"}, "query is blank"),
        ({"user_id": "\u00ad"}, "user_id is blank"),
        ({"request_id": "\x1c"}, "request_id is blank"),
        ({"documents": ["a", "\x00", "c"]}, "documents holds a blank id"),
        ({"documents": ["a", "b", "a"]}, "documents holds an id twice"),
        ({"documents": "abc"}, "documents is no list"),
        ({"latency_ms": float("nan")}, "latency_ms is NaN or infinite"),
        ({"platform": None}, "platform is null"),
        ({"scores": ["high"]}, "a value of the wrong type"),
        ({"query": "\ud800"}, "a value of the wrong type"),
        ({"title": ["one"]}, "title is not one per document"),
        ({"logged": 1 << 62}, "logged is outside"),
    ],
)
def test_a_record_that_breaks_the_table_is_set_aside_and_the_rest_is_compacted(tmp_path, fault, reason):
    """Seen: one page with an invisible query ended every compaction with "query is empty"; retention never ran."""
    write_log(tmp_path / "log", [exposure("r1")])
    body = json.dumps(exposure("bad") | fault).encode()
    with next((tmp_path / "log").glob("*.ablog")).open("ab") as stream:
        stream.write(b"%08x %s\n" % (zlib.crc32(body), body) + encode(exposure("r3")))
    for _ in range(2):  # again: the same rejects, not twice as many
        summary = compact_again(tmp_path)
        (reject,) = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
        assert summary.rejected == 1 and summary.exposures == 2
        assert reject["line"] == 2 and reject["file"].endswith(".ablog") and reject["reason"].startswith(reason)
        assert [row["request_id"] for row in page(tmp_path)] == ["r1", "r3"]


def test_a_definition_whose_fingerprint_is_no_text_is_set_aside(tmp_path):
    """Seen: every later compaction ended with a traceback."""
    odd = {"type": "config", "logged": 1, "fingerprint": ["f"], "definition": {}}
    summary = compacted(tmp_path, [exposure("r1"), odd])
    assert summary.rejected == 1 and summary.exposures == 1


def test_retention_runs_after_a_compaction_with_rejects(tmp_path, monkeypatch, capsys):
    """Seen: retention comes after compaction, so a record that ended compaction kept every old day on disk."""
    write_log(tmp_path / "log", [exposure("r1", query="\u200b"), exposure("r2")])
    main(Config(log=tmp_path / "log", out=tmp_path / "out", retain_days=1))
    assert "1 exposures" in capsys.readouterr().out and not list((tmp_path / "log").glob("*.ablog"))


def test_what_compaction_writes_is_for_owner_and_group_alone(tmp_path):
    """Seen: Parquet days with user ids and queries could be read by every account of the machine."""
    compacted(tmp_path, [exposure("r1"), event("r1", "b"), exposure("r2", query="")])
    names = {path.suffix for path in (tmp_path / "out").rglob("*")}
    assert {".parquet", ".jsonl", ".json"} <= names
    personal = [p for p in (tmp_path / "out").rglob("*") if p.is_dir() or p.suffix in (".parquet", ".jsonl")]
    assert not [path for path in personal if path.stat().st_mode & 0o007]


def test_a_record_of_an_unknown_kind_is_not_dropped_silently(tmp_path):
    with pytest.raises(InputError, match="newer release"):
        compacted(tmp_path, [{"type": "hologram", "logged": NOON}])


def test_the_records_of_these_tests_are_whole_ones():
    """The router checks its own records the same way, so a column that is added to the table must be given a value."""
    for kind, record in (("exposure", exposure("r")), ("event", event("r", "a"))):
        content = {name: value for name, value in record.items() if name not in ("type", "logged")}
        assert complete(kind, content) is content
    with pytest.raises(ValueError, match="exposure record without arm"):
        complete("exposure", {name: None for name in RECORDS["exposure"].names if name not in ("arm", "logged")})
    with pytest.raises(ValueError, match="shadow record with unknown colour"):
        complete("shadow", {name: None for name in [*RECORDS["shadow"].names, "colour"] if name != "logged"})


def test_a_record_of_an_earlier_release_lacks_a_column_and_is_read_with_an_empty_one(tmp_path):
    older = exposure("r1")
    del older["platform"], older["teams"], older["query_length"]
    compacted(tmp_path, [older])
    (row,) = page(tmp_path)
    assert (row["platform"], row["teams"], row["query_length"]) == ("", [], 0)


def test_the_command_prints_counts_and_fails_with_one_line(tmp_path):
    write_log(tmp_path / "log", [exposure("r1"), event("r1", "b")])
    command = [sys.executable, "clients/ab_compact.py", "--out", str(tmp_path / "out"), "--log"]
    good = subprocess.run([*command, str(tmp_path / "log")], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert good.returncode == 0 and "1 exposures (0 repeated), 1 events (0 orphaned)" in good.stdout
    bad = subprocess.run([*command, str(tmp_path / "absent")], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.strip().splitlines()[-1].endswith("no such log folder")
