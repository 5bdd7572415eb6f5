"""A folder that holds clicks.parquet already, of an earlier run or of prepare_clicks."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from ranking.errors import DataError
from ranking.schema import write_table
from training.prepare_data import Config, main

WORDS = ("amber", "birch", "cedar", "daisy", "elder", "fjord", "grove", "hazel", "ivory", "jolly")


def judged(path: Path) -> Path:
    rows = [
        {"query": query, "doc_id": f"d{i}", "title": f"{query} {i}", "grade": i % 3}
        for query in WORDS
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(path: Path | str, out: Path, **settings) -> dict:
    main(Config(source=f"table:{path}", out=out, **settings))
    return json.loads((out / "dataset.json").read_text(encoding="utf-8"))


def clicks_of_a_log(out: Path) -> Path:
    row = {
        "query": ["kiosk"],
        "doc_id": ["d1"],
        "title": ["t"],
        "summary": [""],
        "weight": pa.array([2.0], pa.float32()),
    }
    out.mkdir(exist_ok=True)
    write_table(out / "clicks.parquet", "clicks", pa.table(row))
    return out / "clicks.parquet"


def test_clicks_made_from_earlier_judgments_are_deleted_with_a_word(tmp_path, caplog):
    old, new, out = judged(tmp_path / "old.jsonl"), judged(tmp_path / "new.jsonl"), tmp_path / "out"
    for source in (old, new):
        assert "clicks_are" in prepare(old, out, clicks_from_judgments=True)
        content = prepare(source, out, seed=3)
        assert "clicks" not in content["counts"] and not (out / "clicks.parquet").exists()
        assert "made from the judgments that were here before" in caplog.text
        caplog.clear()


def test_a_logs_clicks_stay_in_either_order_and_at_a_second_run(tmp_path, monkeypatch):
    source, out = judged(tmp_path / "mine.jsonl"), tmp_path / "out"
    clicks_of_a_log(out)
    assert prepare(source, out)["counts"]["clicks"] == 1
    assert prepare(source, out, seed=1)["counts"]["clicks"] == 1
    monkeypatch.chdir(tmp_path)
    assert prepare("mine.jsonl", out)["counts"]["clicks"] == 1  # the same file by another path
    # a log's clicks that took the place of those from judgments
    prepare(source, out, clicks_from_judgments=True)
    (out / "clicks.parquet").unlink()
    clicks_of_a_log(out)
    assert prepare(source, out)["counts"]["clicks"] == 1


def test_a_logs_clicks_beside_another_source_stay_with_a_warning(tmp_path, caplog):
    old, new, out = judged(tmp_path / "old.jsonl"), judged(tmp_path / "new.jsonl"), tmp_path / "out"
    prepare(old, out)
    clicks_of_a_log(out)
    assert prepare(old, out)["counts"]["clicks"] == 1 and "another collection" not in caplog.text
    assert prepare(new, out)["counts"]["clicks"] == 1
    assert f"clicks.parquet stays: it stood beside judgments of table:{old}; delete it if" in caplog.text
    assert "clicks_are" in prepare(new, out, clicks_from_judgments=True)  # these are written anew
    clicks_of_a_log(out)
    (out / "dataset.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset\.json: cannot be read, so nobody knows whose"):
        prepare(new, out)
    (out / "dataset.json").unlink()
    assert prepare(new, out)["counts"]["clicks"] == 1


def test_a_log_beside_another_source_stays_with_a_warning(tmp_path, caplog):
    """Seen: simulated users of one collection stood beside another's judgments, where a page says there is no log."""
    old, new, out = judged(tmp_path / "old.jsonl"), judged(tmp_path / "new.jsonl"), tmp_path / "out"
    simulated = {"judged_fraction": 0.5, "simulate_clicks": "baidu"}
    prepare(old, out, **simulated)
    prepare(old, out)
    prepare(new, out, **simulated)
    assert "events.parquet stays" not in caplog.text
    prepare(old, out, clicks_from_judgments=True)
    assert f"events.parquet stays: it stood beside judgments of table:{new}; delete it if" in caplog.text
    assert (out / "events.parquet").is_file()
