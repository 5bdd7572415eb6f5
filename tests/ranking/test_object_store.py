"""Files and folders in a real S3 server (moto's): whole or absent, checked, taken up where a run broke off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from clients.ab_router import Config as RouterConfig
from ranking.errors import InputError
from ranking.files import write_text
from ranking.object_store import RECORD_NAME, Remote, address, staged
from ranking.program import run
from tests.helpers.bucket_server import bucket_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bucket():
    with bucket_server() as url:
        yield url


@dataclass
class Config:
    """Copies.

    Args:
        source: where from
        out: where to
        more: others
        number: a number
    """

    source: Path
    out: Path
    more: list[Path] = field(default_factory=list)
    number: int = 1


def objects(url: str) -> dict[str, bytes]:
    store, root = pafs.FileSystem.from_uri(url)
    found = store.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    names = [each.path for each in found if each.type == pafs.FileType.File]
    return {name[len(root) + 1 :]: store.open_input_stream(name).read() for name in names}


def put(url: str, content: bytes) -> None:
    store, path = pafs.FileSystem.from_uri(url)
    with store.open_output_stream(path) as stream:
        stream.write(content)


def folder_of(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        write_text(tmp_path / "made" / name.replace("__", "/"), text)
    return tmp_path / "made"


def test_an_address_is_known_as_text_and_as_a_path():
    assert address("s3://b/x/") == address(Path("s3://b/x")) == "s3://b/x"
    assert address(Path("hdfs://name:8020/x")) == "hdfs://name:8020/x"
    assert [address(each) for each in ("grpc://host:1", "/s3:/x", "s3", "runs/s3://x", 3, None)] == [None] * 6


def test_a_program_reads_and_writes_a_store_as_if_it_were_a_disk(bucket, capsys):
    put(f"{bucket}/in/queries.txt", b"night train")

    def copy(config: Config) -> int:
        assert config.source.name == "queries.txt" and not config.out.exists()
        config.out.mkdir()
        (config.out / ".half.part").write_text("hidden: not finished")
        write_text(config.out / "deep" / "copy.txt", config.source.read_text() + config.more[0].name)
        return 7

    argv = ["--source", f"{bucket}/in/queries.txt", "--out", f"{bucket}/out", "--more", f"{bucket}/in/none", "/local"]
    with pytest.raises(SystemExit) as ended:
        run(copy, Config, example="", argv=argv)
    assert ended.value.code == 7
    found = objects(f"{bucket}/out")
    assert found["deep/copy.txt"] == b"night trainnone" and set(found) == {"deep/copy.txt", RECORD_NAME}
    record = json.loads(found[RECORD_NAME])
    assert record["complete"] is True and list(record["files"]) == ["deep/copy.txt"]
    assert objects(f"{bucket}/in") == {"queries.txt": b"night train"}  # what was only read is left alone


def test_an_error_names_the_store_and_not_the_copy(bucket, capsys):
    def fail(config: Config) -> int:
        raise InputError(f"{config.source}: row 3: no title")

    with pytest.raises(SystemExit):
        run(fail, Config, example="", argv=["--source", f"{bucket}/in/a.parquet", "--out", "/tmp"])
    assert f"error: {bucket}/in/a.parquet: row 3: no title" in capsys.readouterr().err


def test_a_store_that_cannot_be_asked_is_one_line_and_what_was_made_is_kept(bucket, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        argv = ["--source", "s3://no-such-bucket/x", "--out", "s3://no-such-bucket/y"]
        run(lambda config: write_text(config.out / "a", "b"), Config, example="", argv=argv)
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "s3://no-such-bucket/y" in line and f"kept in {tmp_path}" in line
    assert [p.read_text() for p in tmp_path.rglob("y/a")] == ["b"]


def test_a_file_that_goes_or_changes_does_so_in_the_store_and_others_are_not_sent_again(bucket, tmp_path):
    remote = Remote(f"{bucket}/changes", folder_of(tmp_path, a="1", b="2", c__d="3"))
    assert remote.publish() == 3 and remote.publish() == 0
    write_text(remote.local / "a", "new")
    (remote.local / "b").unlink()
    assert remote.publish() == 1
    again = Remote(f"{bucket}/changes", tmp_path / "again")
    again.fetch()
    assert {p.name: p.read_text() for p in again.local.rglob("*") if p.is_file()} == {"a": "new", "d": "3"}
    assert again.publish() == 0 and set(objects(f"{bucket}/changes")) == {"a", "c/d", RECORD_NAME}


def test_a_copy_follows_what_another_process_publishes(bucket, tmp_path, monkeypatch):
    first = Remote(f"{bucket}/run", folder_of(tmp_path, checkpoint_1="1", checkpoint_2="2"))
    second = Remote(f"{bucket}/run", tmp_path / "second")
    first.publish()
    second.fetch()
    write_text(second.local / "rng_state_1", "its own")
    (first.local / "checkpoint_1").unlink()
    write_text(first.local / "checkpoint_3", "3")
    first.publish()
    fetched, download = [], second._download
    monkeypatch.setattr(second, "_download", lambda source, path: fetched.append(path.name) or download(source, path))
    second.fetch()
    assert fetched == ["checkpoint_3"]
    assert {p.name for p in second.local.iterdir()} == {"checkpoint_2", "checkpoint_3", "rng_state_1"}


class Cut(Exception):
    """Stands for the machine that goes away."""


def publish_until(remote: Remote, files: int) -> None:
    """Publish, and stop as a killed process would once so many files are there."""
    upload, sent = remote._upload, []

    def one(path: Path, target: str):
        if len(sent) == files:
            raise Cut
        sent.append(target)
        return upload(path, target)

    remote._upload = one  # type: ignore[method-assign]
    with pytest.raises(Cut):
        remote.publish()


def test_a_first_publication_that_was_broken_off_is_not_taken_for_a_folder(bucket, tmp_path):
    made = folder_of(tmp_path, a="1", b="2")
    publish_until(Remote(f"{bucket}/first", made), 1)
    assert set(objects(f"{bucket}/first")) == {"a", RECORD_NAME}
    reader = Remote(f"{bucket}/first", tmp_path / "read")
    reader.fetch()
    assert not reader.local.exists()
    assert Remote(f"{bucket}/first", made).publish() == 2
    reader.fetch()
    assert {p.name: p.read_text() for p in reader.local.iterdir()} == {"a": "1", "b": "2"}


class CutStore:
    """A file system whose machine goes away before its n-th change."""

    CHANGES = ("open_output_stream", "copy_file", "delete_file", "delete_dir")

    def __init__(self, store: pafs.FileSystem, changes: int):
        self.store, self.left = store, changes

    def __getattr__(self, name: str):
        if name in self.CHANGES:
            if not self.left:
                raise Cut
            self.left -= 1
        return getattr(self.store, name)


def test_wherever_a_publication_breaks_off_the_old_state_or_the_new_one_is_there(bucket, tmp_path):
    old, new = {"a": "1", "b": "2", "c": "3"}, {"a": "new", "b": "2", "c": "also new", "d": "4"}
    seen, changes, whole = [], 0, False
    while not whole:
        url, folder = f"{bucket}/cut{changes}", tmp_path / str(changes)
        remote = Remote(url, folder_of(folder, **old))
        remote.publish()
        folder_of(folder, **new)
        remote._store = CutStore(remote._store, changes)
        try:
            remote.publish()
            whole = True
        except Cut:
            pass
        reader = Remote(url, folder / "read")
        reader.fetch()
        seen.append({p.name: p.read_text() for p in reader.local.iterdir()})
        # the same program again, on another machine
        again = Remote(url, folder / "again")
        again.fetch()
        for name, text in new.items():
            write_text(again.local / name, text)
        again.publish()
        found = objects(url)
        assert found.pop(RECORD_NAME) and found == {name: text.encode() for name, text in new.items()}
        changes += 1
    turn = seen.index(new)
    assert seen == [old] * turn + [new] * (len(seen) - turn) and 2 < turn < len(seen) - 2


@pytest.mark.parametrize("content", [b"", b"2", b"22"])
def test_a_damaged_or_cut_object_is_named(bucket, tmp_path, content):
    Remote(f"{bucket}/damaged{len(content)}", folder_of(tmp_path, weights="0")).publish()
    put(f"{bucket}/damaged{len(content)}/weights", content)
    with pytest.raises(InputError, match="/weights: not the file that was published"):
        Remote(f"{bucket}/damaged{len(content)}", tmp_path / "read").fetch()


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"complete": true}', b'{"complete": true, "files": {"a": 1}}'])
def test_a_record_that_makes_no_sense_is_named(bucket, tmp_path, record):
    put(f"{bucket}/senseless/{RECORD_NAME}", record)
    with pytest.raises(InputError, match=RECORD_NAME):
        Remote(f"{bucket}/senseless", tmp_path / "read").fetch()


def test_a_record_cannot_write_outside_of_the_copy(bucket, tmp_path):
    files = {"../outside": [1, "0" * 64]}
    put(f"{bucket}/hostile/{RECORD_NAME}", json.dumps({"complete": True, "files": files}).encode())
    put(f"{bucket}/outside", b"1")
    with pytest.raises(InputError, match="outside of it"):
        Remote(f"{bucket}/hostile", tmp_path / "in" / "read").fetch()
    assert not (tmp_path / "in" / "outside").exists()


def test_a_folder_that_another_program_put_there_is_taken_as_it_is(bucket, tmp_path):
    put(f"{bucket}/foreign/day=1/part.parquet", b"rows")
    remote = Remote(f"{bucket}/foreign", tmp_path / "read")
    remote.fetch()
    assert (tmp_path / "read/day=1/part.parquet").read_bytes() == b"rows"
    assert remote.publish() == 0 and set(objects(f"{bucket}/foreign")) == {"day=1/part.parquet"}


WRITER = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from ranking.files import write_text
from ranking.object_store import staged

@dataclass
class Config:
    out: Path

config = Config(Path(sys.argv[1]))
with staged(config, seconds=0.05):
    for number in range(40):
        if not (config.out / f"shard-{number}").exists():
            write_text(config.out / f"shard-{number}", str(number) * 1000)
            print(number, flush=True)
            time.sleep(0.05)
"""


def test_a_killed_program_goes_on_where_its_shards_were_published(bucket):
    url = f"{bucket}/killed"
    written: list[list[str]] = []
    for kill_after in (12, 12, None):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, url], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        written.append([])
        for line in writer.stdout:
            written[-1].append(line.strip())
            if kill_after and len(written[-1]) == kill_after:
                time.sleep(0.2)
                writer.send_signal(signal.SIGKILL)
        writer.wait(30)
    assert written[1][0] != "0" and written[2][0] not in ("0", written[1][0])  # each went on
    found = objects(url)
    found.pop(RECORD_NAME)
    assert found == {f"shard-{n}": (str(n) * 1000).encode() for n in range(40)}


def test_two_settings_of_one_address_are_one_copy(bucket):
    put(f"{bucket}/both/x", b"1")
    config = Config(Path(f"{bucket}/both"), Path(f"{bucket}/both"))
    with staged(config) as remotes:
        assert config.source == config.out and len(remotes) == 1
        write_text(config.out / "y", "2")
    assert set(objects(f"{bucket}/both")) == {"x", "y", RECORD_NAME}


def test_the_router_does_not_log_to_a_store():
    with pytest.raises(ValueError, match="log is s3://bucket/log"):
        RouterConfig(experiment=Path("e.yaml"), log=Path("s3://bucket/log"), raw_ids=True)
