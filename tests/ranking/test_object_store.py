"""Files and folders in a real S3 server (moto's): whole or absent, checked, taken up where a run broke off."""

from __future__ import annotations

import glob
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
from ranking import object_store
from ranking.errors import InputError
from ranking.files import write_text
from ranking.object_store import RECORD_NAME, Remote, address, as_addressed, staged
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


def texts(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_wherever_a_publication_breaks_off_the_old_state_or_the_new_one_is_there(bucket, tmp_path):
    old = {"a": "1", "b": "2", "c": "3", "e": "5"}
    new = {"a": "new", "b": "2", "c": "also new", "d": "4"}
    seen, changes, whole = [], 0, False
    while not whole:
        url, folder = f"{bucket}/cut{changes}", tmp_path / str(changes)
        remote = Remote(url, folder_of(folder, **old))
        remote.publish()
        (folder_of(folder, **new) / "e").unlink()
        remote._store = CutStore(remote._store, changes)
        try:
            remote.publish()
            whole = True
        except Cut:
            pass
        reader = Remote(url, folder / "read")
        reader.fetch()
        seen.append(texts(reader.local))
        # the same program again, on another machine
        again = Remote(url, folder / "again")
        again.fetch()
        (again.local / "e").unlink(missing_ok=True)
        for name, text in new.items():
            write_text(again.local / name, text)
        again.publish()
        found = objects(url)
        assert found.pop(RECORD_NAME) and found == {name: text.encode() for name, text in new.items()}
        changes += 1
    turn = seen.index(new)
    assert seen == [old] * turn + [new] * (len(seen) - turn) and 2 < turn < len(seen) - 2


def test_a_publication_that_failed_is_whole_at_the_next_try(bucket, tmp_path):
    changes, whole = 0, False
    while not whole:
        url, folder = f"{bucket}/try{changes}", tmp_path / str(changes)
        remote = Remote(url, folder_of(folder, a="1", b="2", c="3"))
        store, remote._store = remote._store, CutStore(remote._store, changes)
        try:
            remote.publish()
            whole = True
        except Cut:
            remote._store = store
            remote.publish()
        reader = Remote(url, folder / "read")
        reader.fetch()
        assert texts(reader.local) == {"a": "1", "b": "2", "c": "3"}
        changes += 1


def test_wherever_a_single_object_in_a_published_folder_breaks_off_the_folder_can_be_read(bucket, tmp_path):
    seen, changes, whole = [], 0, False
    while not whole:
        url, folder = f"{bucket}/object{changes}", tmp_path / str(changes)
        Remote(url, folder_of(folder, candidates="old", judgments="1")).publish()
        single = Remote(f"{url}/candidates", folder / "candidates")
        write_text(single.local, "new")
        single._store = CutStore(single._store, changes)
        try:
            single.publish()
            whole = True
        except Cut:
            pass
        reader = Remote(url, folder / "read")
        reader.fetch()
        seen.append(texts(reader.local)["candidates"])
        changes += 1
    assert {"old", "new"} == set(seen) and seen == sorted(seen, reverse=True) and len(seen) > 3
    assert set(objects(url)) == {"candidates", "judgments", RECORD_NAME}


def test_an_interrupted_upload_leaves_no_half_of_a_file(bucket, tmp_path, monkeypatch):
    """Seen: after Ctrl-C the bucket held the first pieces of candidates.parquet, under its name."""
    (tmp_path / "made").write_bytes(b"12345678")

    class Interrupted:
        def __init__(self) -> None:
            self.pieces = 0

        def update(self, piece: bytes) -> None:
            self.pieces += 1
            if self.pieces == 2:
                raise KeyboardInterrupt

    url = f"{bucket}/single/made"
    with monkeypatch.context() as patched:
        patched.setattr("ranking.object_store._PIECE", 4)
        patched.setattr("ranking.object_store.hashlib.sha256", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            Remote(url, tmp_path / "made").publish()
    assert objects(f"{bucket}/single") == {}
    assert Remote(url, tmp_path / "made").publish() == 1
    assert objects(f"{bucket}/single") == {"made": b"12345678"}


def test_a_program_that_writes_into_a_published_folder_changes_its_record(bucket, tmp_path):
    """Seen: after `sample_candidates --out s3://b/data/candidates.parquet` nobody could read s3://b/data any more."""
    Remote(f"{bucket}/dataset", folder_of(tmp_path, candidates="all", judgments__train="1")).publish()
    config = Config(Path(f"{bucket}/dataset"), Path(f"{bucket}/dataset/candidates"), [Path(f"{bucket}/dataset/clicks")])
    with staged(config):
        write_text(config.out, "some")
        write_text(config.more[0], "of a log")
        write_text(config.more[0].parent / "clicks.report.json", "{}")
    written = {"candidates": "some", "clicks": "of a log", "clicks.report.json": "{}", "judgments/train": "1"}
    assert set(json.loads(objects(f"{bucket}/dataset")[RECORD_NAME])["files"]) == set(written)
    reader = Remote(f"{bucket}/dataset", tmp_path / "read")
    reader.fetch()
    assert texts(reader.local) == written
    with staged(config := Config(Path(f"{bucket}/dataset/clicks"), Path("/local"))):
        config.source.unlink()
    reader.fetch()
    assert "clicks" not in texts(reader.local) and "clicks" not in objects(f"{bucket}/dataset")


@pytest.mark.parametrize("there", ["new", "old"])
def test_two_programs_that_write_files_into_one_folder_at_once_keep_each_others(bucket, tmp_path, monkeypatch, there):
    """Seen: the slower one put the record back as it had read it, and the other's file was of nobody, or damaged."""
    files = {"candidates": "old", "clicks": "old"} if there == "old" else {"a": "1"}
    Remote(f"{bucket}/at-once-{there}", folder_of(tmp_path, **files)).publish()
    slow, quick = (
        Remote(f"{bucket}/at-once-{there}/{name}", tmp_path / f"{name}.new") for name in ("candidates", "clicks")
    )
    whole, begun = Remote._upload, []

    def upload(self, path, target):
        found = whole(self, path, target)
        if self is slow and not begun:
            begun.append(write_text(quick.local, "of the quick one"))
            quick.publish()
        return found

    monkeypatch.setattr(Remote, "_upload", upload)
    write_text(slow.local, "of the slow one")
    slow.publish()
    reader = Remote(f"{bucket}/at-once-{there}", tmp_path / "read")
    reader.fetch()
    assert texts(reader.local) == files | {"candidates": "of the slow one", "clicks": "of the quick one"}
    assert json.loads(objects(f"{bucket}/at-once-{there}")[RECORD_NAME])["files"].keys() == texts(reader.local).keys()


def test_what_others_put_into_a_published_folder_is_taken_and_stays_theirs(bucket, tmp_path):
    remote = Remote(f"{bucket}/shared", folder_of(tmp_path, a="1"))
    remote.publish()
    put(f"{bucket}/shared/day/raw", b"2")
    reader = Remote(f"{bucket}/shared", tmp_path / "read")
    reader.fetch()
    assert texts(reader.local) == {"a": "1", "day/raw": "2"}
    write_text(reader.local / "a", "new")
    reader.publish()
    put(f"{bucket}/shared/day/raw", b"3")  # what a record does not name may change
    reader.fetch()
    assert texts(reader.local) == {"a": "new", "day/raw": "3"}


def test_a_folder_that_others_fill_gets_no_record(bucket, tmp_path):
    """Seen: after `ab_compact --log s3://b/log --retain-days 30` no raw file that was uploaded later was read."""
    put(f"{bucket}/raw-log/day1", b"1")
    put(f"{bucket}/raw-log/day2", b"2")
    with staged(config := Config(Path(f"{bucket}/raw-log"), Path("/local"))):
        (config.source / "day1").unlink()
        write_text(config.source / "note", "n")
    put(f"{bucket}/raw-log/day3", b"3")
    reader = Remote(f"{bucket}/raw-log", tmp_path / "read")
    reader.fetch()
    assert texts(reader.local) == {"day2": "2", "day3": "3", "note": "n"}
    assert RECORD_NAME not in objects(f"{bucket}/raw-log")


def test_hidden_objects_and_the_records_of_folders_inside_stay_where_they_are(bucket, tmp_path):
    """Seen: a program that only read `s3://b/runs` removed `student/_published.json` and `.keep` there."""
    Remote(f"{bucket}/nested/student", folder_of(tmp_path, weights="1")).publish()
    put(f"{bucket}/nested/.keep", b"")
    before = objects(f"{bucket}/nested")
    remote = Remote(f"{bucket}/nested", tmp_path / "read")
    remote.fetch()
    assert remote.publish() == 0 and objects(f"{bucket}/nested") == before
    assert texts(remote.local) == {"student/weights": "1"}


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("2026-*.txt", ["2026-01.txt", "2026-02.txt"]),
        ("2026-0[2-9].txt", ["2026-02.txt"]),
        ("*/2026-*.txt", ["eu/2026-03.txt"]),
        ("**/2026-0*.txt", ["2026-01.txt", "2026-02.txt", "eu/2026-03.txt"]),
        ("none*", []),
    ],
)
def test_a_pattern_stands_for_the_objects_that_it_matches(bucket, pattern, found):
    for name in ("2026-01.txt", "2026-02.txt", "2025-12.txt", "eu/2026-03.txt"):
        put(f"{bucket}/patterns/{name}", name.encode())
    with staged(config := Config(Path(f"{bucket}/patterns/{pattern}"), Path("/local"))) as (remote,):
        taken = glob.glob(str(config.source), recursive=True)  # noqa: PTH207
        assert sorted(Path(name).read_text() for name in taken) == found
        assert as_addressed(str(config.source), [remote]) == f"{bucket}/patterns/{pattern}"
        assert "2025-12.txt" not in texts(remote.local)
    assert RECORD_NAME not in objects(f"{bucket}/patterns")


@pytest.mark.parametrize("value", ["s3://logs-*/2026.parquet", "s3://*"])
def test_a_pattern_of_buckets_is_refused(value):
    with pytest.raises(InputError, match="may not stand for buckets"), staged(Config(Path(value), Path("/local"))):
        pass


@pytest.mark.parametrize("value", ["table:s3://b/x.csv", "ours=checkpoint:s3://b/run", "dataset:gs://b/data"])
def test_an_address_behind_a_kind_is_refused_by_name(value):
    config = Config(Path("/local"), Path("/local"), [value])  # type: ignore[list-item]
    message = f"{value}: after (table|checkpoint|dataset): a path of this machine"
    with pytest.raises(InputError, match=message), staged(config):
        pass
    others = ["spark.eventLog.dir=hdfs://name:8020/x", "grpc://host:1", "minilm"]
    with staged(config := Config(Path("/local"), Path("/local"), others)):  # type: ignore[arg-type]
        assert config.more == others


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

config, most = Config(Path(sys.argv[1])), int(sys.argv[2])
with staged(config, seconds=0.05):
    for number in range(40):
        if not (config.out / f"shard-{number}").exists():
            write_text(config.out / f"shard-{number}", str(number) * 1000)
            print(number, flush=True)
            most -= 1
            while not most:  # to be killed
                time.sleep(1)
"""


def published(url: str) -> set[str]:
    """Numbers of the shards that the record in the store names."""
    record = objects(url).get(RECORD_NAME, b'{"files": {}}')
    return {name.removeprefix("shard-") for name in json.loads(record)["files"]}


def test_a_killed_program_goes_on_where_its_shards_were_published(bucket):
    url = f"{bucket}/killed"
    written: list[list[str]] = []
    for kill_after in (12, 12, 99):
        command = [sys.executable, "-c", WRITER, url, str(kill_after)]
        writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        written.append([])
        for line in writer.stdout:
            written[-1].append(line.strip())
            if len(written[-1]) == kill_after:
                until = time.monotonic() + 60
                while not set(written[-1]) & published(url):
                    assert time.monotonic() < until
                    time.sleep(0.05)
                writer.send_signal(signal.SIGKILL)
        writer.wait(60)
    assert written[1][0] != "0" and written[2][0] not in ("0", written[1][0])  # each went on
    found = objects(url)
    found.pop(RECORD_NAME)
    assert found == {f"shard-{n}": (str(n) * 1000).encode() for n in range(40)}


def test_a_folder_that_goes_while_it_is_listed_does_not_end_publishing(bucket, monkeypatch):
    """Seen: a checkpoint that a training removed just then ended the thread, and nothing was published any more."""
    listed, list_files = [], object_store._visible_files

    def one_goes(folder: Path):
        listed.append(folder)
        if len(listed) == 1:
            raise FileNotFoundError(2, "No such file or directory", f"{folder}/checkpoint-1")
        return list_files(folder)

    monkeypatch.setattr(object_store, "_visible_files", one_goes)
    with staged(config := Config(Path("/local"), Path(f"{bucket}/listed")), seconds=0.02):
        write_text(config.out / "checkpoint-2", "2")
        deadline = time.monotonic() + 20
        while "checkpoint-2" not in objects(f"{bucket}/listed"):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("given", ["a minute", "0", "-1", "nan", "1e300"])
def test_an_interval_that_nobody_can_wait_for_is_refused(given, monkeypatch):
    monkeypatch.setenv("DISRANKER_PUBLISH_SECONDS", given)
    with (
        pytest.raises(InputError, match="DISRANKER_PUBLISH_SECONDS is"),
        staged(Config(Path("/local"), Path("/local"))),
    ):
        pass


def test_two_settings_of_one_address_are_one_copy(bucket):
    put(f"{bucket}/both/x", b"1")
    config = Config(Path(f"{bucket}/both"), Path(f"{bucket}/both"))
    with staged(config) as remotes:
        assert config.source == config.out and len(remotes) == 1
        write_text(config.out / "y", "2")
    assert set(objects(f"{bucket}/both")) == {"x", "y"}


def test_the_router_does_not_log_to_a_store():
    with pytest.raises(ValueError, match="log is s3://bucket/log"):
        RouterConfig(experiment=Path("e.yaml"), log=Path("s3://bucket/log"), raw_ids=True)
