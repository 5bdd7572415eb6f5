"""Erasing a person: nothing stored under any of their names is left, and nobody else loses anything."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from clients.ab.log import erasure
from clients.ab.log.compaction import compact
from clients.ab.log.days_lock import LOCK, days_lock
from clients.ab.log.erasure import PENDING, Erasure
from clients.ab.log.privacy import Privacy
from clients.ab.log.reader import ReadCounts, read_folder
from clients.ab.log.writer import ExposureLog
from clients.ab_erase import EXIT_IN_USE, EXIT_NOT_FOUND, Config, main
from ranking.errors import InputError
from ranking.program import parse
from ranking.query_engine import QueryEngineSettings
from ranking.schema import iter_table, read_table
from tests.clients.ab.log.test_compact import ROOT, event, exposure, write_log

SALTS = [b"the salt of this year", b"the salt of last year"]


def shadow(request_id: str) -> dict:
    page = exposure(request_id)
    kept = ("logged", "request_id", "experiment", "arm", "latency_ms", "documents", "scores")
    return {"type": "shadow", "model": "m", "failure": "", **{name: page[name] for name in kept}}


@pytest.fixture
def written(tmp_path) -> Config:
    """Pages of `ann` under three names and of `bob`, raw and compacted. Seen: there was no way to erase anybody."""
    names = {"raw": "ann", "this": Privacy(SALTS[0]).user("ann"), "last": Privacy(SALTS[1]).user("ann"), "bob": "bob"}
    records = [exposure(page, user_id=name) for page, name in names.items()]
    records += [event(page, "b") for page in names] + [shadow(page) for page in names]
    forced = {"ann": "student", "bob": "student"}
    records.append(
        {"type": "config", "logged": 1, "fingerprint": "f1", "definition": {"name": "exp", "forced": forced}}
    )
    records.append(exposure("bad", user_id="ann", platform=None))
    write_log(tmp_path / "log", records, tail=b'00000000 {"user_id":"ann"}\n00000000 {"user_id":"bob"}\n')
    compact(tmp_path / "log", tmp_path / "out", QueryEngineSettings())
    for number, salt in enumerate(SALTS):
        (tmp_path / f"salt-{number}").write_bytes(salt)
    return Config(["ann"], tmp_path / "log", tmp_path / "out", [tmp_path / f"salt-{n}" for n in range(2)])


def stored(config: Config) -> bytes:
    assert config.data is not None
    small = [config.data / "experiments.json", config.data / "rejects.jsonl"]
    return b"".join(path.read_bytes() for path in [*config.log.glob("*.ablog"), *small])


def pages(folder: Path, table: str) -> set[str]:
    rows = [row for path in (folder / table).glob("*.parquet") for row in read_table(path, table).to_pylist()]
    return {row["request_id"] for row in rows}


def test_every_name_of_a_person_goes_and_nobody_else(written, capsys):
    assert b"ann" in stored(written)
    assert main(written) == 0 and "4 pages erased" in capsys.readouterr().out
    for name in ("ann", *(Privacy(salt).user("ann") for salt in SALTS)):
        assert name.encode() not in stored(written)
    left = list(read_folder(written.log, ReadCounts()))
    assert {r["request_id"] for r in left if r["type"] != "config"} == {"bob"} and len(left) == 4
    assert next(r for r in left if r["type"] == "config")["definition"]["forced"] == {"bob": "student"}
    assert b'{"user_id":"bob"}' in stored(written)
    assert {table: pages(written.data, table) for table in ("exposures", "events", "shadows")} == {
        "exposures": {"bob"}, "events": {"bob"}, "shadows": {"bob"},
    }  # fmt: skip
    assert main(written) == EXIT_NOT_FOUND and "0 pages erased: 0 lines" in capsys.readouterr().out
    assert all(p.stat().st_mode & 0o007 == 0 for p in [*written.log.glob("*.ablog"), *written.data.rglob("*.parquet")])
    assert json.loads((written.data / "experiments.json").read_text())["f1"]["definition"]["forced"] == {
        "bob": "student"
    }


def test_whoever_has_no_page_is_named_with_an_exit_code_of_its_own(written, caplog, capsys):
    """Seen: 0 pages erased, exit code 0, whether the id or the salt was wrong."""
    assert main(replace(written, user=["ann", "anne"])) == EXIT_NOT_FOUND
    assert "4 pages erased" in capsys.readouterr().out and "no page of 'anne': erased before" in caplog.text
    caplog.clear()
    write_log(written.log, [exposure("p1", user_id=Privacy(SALTS[0]).user("ann"))])
    wrong, right = ([salt] for salt in reversed(written.salt_file))
    assert main(Config(["ann"], written.log, salt_file=wrong)) == EXIT_NOT_FOUND and "no page of 'ann'" in caplog.text
    assert main(Config(["ann"], written.log, salt_file=right)) == 0


def test_an_id_with_a_comma_is_one_persons(tmp_path):
    """Seen: `--user smith,john` erased the two users smith and john, and left whom it named."""
    users = {"p1": "smith,john", "p2": "smith", "p3": "john"}
    write_log(tmp_path, [exposure(page, user_id=user) for page, user in users.items()])
    words = ["--user", "smith,john", "--log", str(tmp_path), "--raw-ids"]
    assert main(parse(Config, words, prog="ab_erase.py")) == 0
    assert {record["user_id"] for record in read_folder(tmp_path, ReadCounts())} == {"smith", "john"}


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--user", "u1"], "give --salt-file for every salt"), (["--user", "", "--raw-ids"], "user is blank")],
)
def test_an_erasure_that_could_find_nobody_is_refused(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        parse(Config, [*words, "--log", str(tmp_path)], prog="ab_erase.py")
    assert said in capsys.readouterr().err


def test_a_file_that_a_router_appends_to_is_left_and_named(tmp_path, caplog):
    log = ExposureLog(tmp_path / "log")
    content = {k: v for k, v in exposure("r", user_id="ann").items() if k not in ("type", "logged")}
    assert log.write("exposure", content)
    config = Config(["ann"], tmp_path / "log", raw_ids=True)
    assert main(config) == 3 and "run this again" in caplog.text
    assert log.write("exposure", content)
    log.close()
    assert main(config) == 0 and not list(read_folder(config.log, ReadCounts()))


def killed_compaction(raw: Path, out: Path, temporary: Path | None) -> list[Path]:
    """Compact and be killed once a day is being written; returns what that left of `ann`."""
    program = f"""
import os, pathlib, signal
from clients.ab.log import compaction
from ranking.query_engine import QueryEngineSettings
def die(path, table, pieces):
    path.with_name(f".{{path.name}}.1.part").write_bytes(b"ann")
    os.kill(os.getpid(), signal.SIGKILL)
compaction.write_table = die
settings = QueryEngineSettings(temp_folder={str(temporary)!r} and pathlib.Path({str(temporary)!r}))
compaction.compact(pathlib.Path({str(raw)!r}), pathlib.Path({str(out)!r}), settings)
""".replace("'None'", "None")
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -9
    return holding_ann(out) + (holding_ann(temporary) if temporary else [])


def holding_ann(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and b"ann" in path.read_bytes()]


@pytest.mark.parametrize("temporary", [False, True])
@pytest.mark.parametrize("next_run", ["erase", "compact"])
def test_what_a_killed_compaction_left_of_a_person_goes_with_the_next_run(tmp_path, caplog, temporary, next_run):
    """Seen: the scratch database of a killed run stayed for ever, after ab_erase too."""
    elsewhere = tmp_path / "scratch" if temporary else None
    if elsewhere:
        elsewhere.mkdir()
    raw, out = tmp_path / "log", tmp_path / "out"
    write_log(raw, [exposure(f"r{i}", user_id="ann") for i in range(500)] + [exposure("r", user_id="bob")])
    assert len(killed_compaction(raw, out, elsewhere)) >= 2
    if next_run == "erase":
        assert main(Config(["ann"], raw, out, raw_ids=True)) == 0
    else:
        write_log(raw, [exposure("r", user_id="bob")])
        compact(raw, out, QueryEngineSettings())
    assert not holding_ann(tmp_path) and caplog.text.count("was killed had left it") == 2
    assert not (elsewhere and list(elsewhere.iterdir())) and not (out / LOCK).exists()


@pytest.mark.parametrize("original", ["there", "removed", "written"])
def test_what_a_killed_erasure_left_beside_a_raw_file_goes_with_the_next_one(tmp_path, original):
    """Seen: the half of a file stayed for ever, with pages of whoever was erased later."""
    raw = tmp_path / "log"
    write_log(raw, [exposure("p1", user_id="ann"), exposure("p2", user_id="bob")])
    (path,) = raw.glob("*.ablog")
    program = f"""
import os, pathlib, ranking.files
from clients.ab.log.erasure import PENDING, Erasure
ranking.files.flush = lambda path: ".ablog." in path.name and os.kill(os.getpid(), 9)
Erasure(["bob"]).run(pathlib.Path({str(raw)!r}), None)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -9
    assert len(holding_ann(raw)) == 2
    if original == "removed":
        path.unlink()
    with path.open("rb") if original == "written" else nullcontext() as other:
        if other is not None:  # another erasure is at work on the file: what stands beside it may be its own
            fcntl.flock(other, fcntl.LOCK_EX)
        Erasure(["ann"]).run(raw, None)
        assert len(holding_ann(raw)) == (2 if other is not None else 0)
    Erasure(["ann"]).run(raw, None)
    assert not holding_ann(raw) and list(raw.iterdir()) == ([] if original == "removed" else [path])


@pytest.mark.parametrize("stopped", ["in use", "killed"])
def test_what_an_erasure_could_not_finish_is_finished_by_the_next_one(tmp_path, stopped, caplog):
    """Seen: once the page was erased, nobody knew whose its click and shadow score in another file were; exit 0."""
    raw, out = tmp_path / "log", tmp_path / "out"
    write_log(raw, [exposure("p1", user_id="ann"), exposure("p2", user_id="bob")])
    later = [event("p1", "b"), shadow("p1"), event("p2", "b"), shadow("p2")]
    second = write_log(raw, later, name="2024-10-04T130000.000000-1-1")
    compact(raw, out, QueryEngineSettings())
    if stopped == "in use":
        with second.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert main(Config(["ann", "anne"], raw, out, raw_ids=True)) == EXIT_IN_USE
        assert "no page of 'anne':" in caplog.text
        shutil.copytree(raw, tmp_path / "copy")
        assert main(Config(["anne"], tmp_path / "copy", raw_ids=True)) == EXIT_NOT_FOUND  # though ann is pending
        shutil.rmtree(tmp_path / "copy")
    else:
        program = f"""
import os, pathlib
from clients.ab.log.erasure import PENDING, Erasure
whole = Erasure._raw_file
Erasure._raw_file = lambda self, path: os.kill(os.getpid(), 9) if path.name == {second.name!r} else whole(self, path)
Erasure(["ann"]).run(pathlib.Path({str(raw)!r}), pathlib.Path({str(out)!r}))
"""
        assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -9
    assert b"p1" in second.read_bytes()
    compact(raw, out, QueryEngineSettings())
    assert main(Config(["ann"], raw, out, raw_ids=True)) == 0
    compact(raw, out, QueryEngineSettings())
    assert pages(out, "exposures") == pages(out, "events") == pages(out, "shadows") == {"p2"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"p1" in path.read_bytes()]
    assert not list(tmp_path.rglob(".erasure*"))
    (raw / PENDING).write_text("{half")
    with pytest.raises(InputError, match="nobody knows what is left to erase"):
        main(Config(["ann"], raw, out, raw_ids=True))


def test_records_of_odd_types_stop_no_erasure(tmp_path):
    """Seen: a record whose user is a list, or whose forced users are one, was a traceback."""
    definition = {"type": "config", "logged": 1, "fingerprint": "f", "definition": {"forced": ["ann"]}}
    write_log(tmp_path / "log", [exposure("p1", user_id=["ann"]), definition, exposure("p2", user_id="ann")])
    assert Erasure(["ann"]).run(tmp_path / "log", None).pages == 1


@pytest.mark.parametrize("name", ["experiments.json", "ramps.json", "rejects.jsonl"])
def test_a_small_file_of_which_a_half_is_left_is_named(written, name):
    """Seen: a traceback of the JSON parser, from erasure and compaction alike."""
    path = written.data / name
    path.write_text(path.read_text()[:-5] or "[")
    if name != "ramps.json":
        with pytest.raises(InputError, match=f"{name}: cannot be read"):
            main(written)
    if name != "rejects.jsonl":
        with pytest.raises(InputError, match=f"{name}: cannot be read"):
            compact(written.log, written.data, QueryEngineSettings())


def test_a_day_is_rewritten_piece_by_piece(tmp_path, monkeypatch):
    """Seen: each day was read as a whole, at 1 GB for 20,000 pages of 50 documents: larger logs could not be erased."""
    monkeypatch.setattr(erasure, "iter_table", partial(iter_table, batch_rows=500), raising=False)
    texts = [f"{number} {'word ' * 1000}" for number in range(10)]
    pages = [exposure(f"r{n}", user_id=f"u{n % 9}", documents=list("abcdefghij"), scores=[], title=texts, summary=texts)
             for n in range(200)]  # fmt: skip
    write_log(tmp_path / "log", pages)
    compact(tmp_path / "log", tmp_path / "out", QueryEngineSettings())
    (tmp_path / "empty").mkdir()
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert Erasure(["u3"]).run(tmp_path / "empty", tmp_path / "out").rows == 22 * 11
    finally:
        pa.set_memory_pool(before)
    left = read_table(tmp_path / "out" / "events" / "2024-10-04.parquet", "events")
    assert len(left) == 178 * 10 and pool.max_memory() < left.nbytes


def test_erasure_waits_for_a_compaction_that_would_write_the_person_again(written, caplog):
    with days_lock(written.data):
        erasing = threading.Thread(target=Erasure(["ann"]).run, args=(written.log, written.data))
        erasing.start()
        until = time.monotonic() + 60
        while "waiting for another" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert erasing.is_alive() and b'"ann"' in stored(written)
    erasing.join()
    assert b'"ann"' not in stored(written)
