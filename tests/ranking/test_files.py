"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranking.files import new_folder, replacing, replacing_folder, write_json, write_text


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "below" / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as aside:
        aside.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old" and names(path.parent) == ["file.txt"]
    write_text(path, "né")
    assert path.read_bytes() == "né".encode()


def test_a_full_disk_is_told_with_the_file(tmp_path):
    """Seen: "error: No space left on device", and nobody knew on which one."""
    with pytest.raises(OSError, match="No space left") as caught, replacing(tmp_path / "page.html"):
        Path("/dev/full").write_text("x" * 10_000)
    assert caught.value.filename == str(tmp_path / "page.html")
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "page.html"):
        (tmp_path / "nowhere").read_text()
    assert caught.value.filename == str(tmp_path / "nowhere")


def test_json_keeps_its_letters_and_refuses_what_json_has_not(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"title": "né", "n": [1, 2]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"title": "né", "n": [1, 2]} and "né" in path.read_text(
        "utf-8"
    )
    write_json(path, [1, 2], indent=None)
    assert path.read_text(encoding="utf-8") == "[1, 2]\n"
    for content in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            write_json(path, {"score": content})
    assert path.read_text(encoding="utf-8") == "[1, 2]\n" and names(tmp_path) == ["a.json"]


def test_a_new_folder_is_never_written_over(tmp_path):
    path = tmp_path / "3"
    with new_folder(path) as aside:
        (aside / "model").write_text("one", encoding="utf-8")
        assert not path.exists()
    with pytest.raises(OSError), new_folder(path) as aside:
        (aside / "model").write_text("two", encoding="utf-8")
    assert (path / "model").read_text(encoding="utf-8") == "one" and names(tmp_path) == ["3"]


def test_a_folder_is_replaced_whole_or_kept(tmp_path):
    path, elsewhere = tmp_path / "models" / "teacher", tmp_path
    for content in ("one", "two"):
        with replacing_folder(path, aside_in=elsewhere) as aside:
            (aside / "sub").mkdir()
            (aside / "sub" / content).write_text(content, encoding="utf-8")
        assert names(path / "sub") == [content]
    with pytest.raises(RuntimeError), replacing_folder(path, aside_in=elsewhere) as aside:
        raise RuntimeError
    assert names(path / "sub") == ["two"] and names(tmp_path) == ["models"] and names(path.parent) == ["teacher"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "teacher"
    path.mkdir()
    (path / "kept").touch()
    rename = type(path).rename

    def fail_once(self, target):
        if self.name.endswith(".part"):
            raise OSError("the disk says no")
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", fail_once)
    with pytest.raises(OSError, match="says no"), replacing_folder(path):
        pass
    assert names(path) == ["kept"] and names(tmp_path) == ["teacher"]
