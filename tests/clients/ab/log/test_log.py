"""The raw log: durability, torn tails, damage, rotation, failing disks, privacy."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from clients.ab.log import writer
from clients.ab.log.lines import DAY_MICROSECONDS, decode, encode
from clients.ab.log.privacy import Privacy, PrivacySettings
from clients.ab.log.reader import ReadCounts, log_files, read_file, read_folder
from clients.ab.log.writer import ExposureLog
from ranking.errors import InputError


def read(folder) -> tuple[list[dict], ReadCounts]:
    counts = ReadCounts()
    return list(read_folder(folder, counts)), counts


def write_all(log: ExposureLog, records: list[dict]) -> list[bool]:
    async def go():
        return await asyncio.gather(*(log.append("event", record) for record in records))

    return asyncio.run(go())


def test_what_was_appended_is_read_back_in_order(tmp_path):
    log = ExposureLog(tmp_path)
    sent = [{"n": i, "text": 'line\nbreak "quoted" 用户 😀'} for i in range(500)]
    assert all(write_all(log, sent))
    records, counts = read(tmp_path)
    assert [{k: r[k] for k in ("n", "text")} for r in records] == sent
    assert (counts.files, counts.records, counts.torn, counts.damaged) == (1, 500, 0, [])
    assert all(abs(r["logged"] / 1e6 - time.time()) < 60 for r in records)


def test_group_commit_syncs_once_for_many_waiting_records(tmp_path, monkeypatch):
    syncs = []
    real = os.fdatasync

    def slow(descriptor):
        syncs.append(1)
        time.sleep(0.02)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    log = ExposureLog(tmp_path)
    assert all(write_all(log, [{"n": i} for i in range(200)]))
    assert len(syncs) < 10


def test_nothing_is_acknowledged_before_it_is_synced(tmp_path, monkeypatch):
    done: list[float] = []
    real = os.fdatasync

    def slow(descriptor):
        time.sleep(0.1)
        real(descriptor)
        done.append(time.monotonic())

    monkeypatch.setattr(os, "fdatasync", slow)
    log = ExposureLog(tmp_path)
    assert log.write("event", {})
    assert time.monotonic() >= done[0]


@pytest.mark.parametrize("keep", [1, 9, 30, -1])
def test_a_torn_tail_is_skipped_and_counted(tmp_path, keep):
    whole = encode({"n": 1}) + encode({"n": 2})
    torn = encode({"n": 3, "text": "x" * 40})
    (tmp_path / "2026-01-01T000000.000000-1-1.ablog").write_bytes(whole + torn[:keep])
    records, counts = read(tmp_path)
    assert [r["n"] for r in records] == [1, 2]
    assert counts.torn == 1 and not counts.damaged


def test_damage_in_the_middle_is_named_and_the_rest_is_read(tmp_path):
    lines = [encode({"n": i}) for i in range(4)]
    lines[1] = lines[1].replace(b'"n":1', b'"n":7')
    path = tmp_path / "2026-01-01T000000.000000-1-1.ablog"
    path.write_bytes(b"".join(lines))
    records, counts = read(tmp_path)
    assert [r["n"] for r in records] == [0, 2, 3]
    assert counts.damaged == [f"{path}:2"] and counts.torn == 0


NESTED = b"[" * 100_000
DAMAGED = [
    b"",
    b"zzzzzzzz {}",
    b"00000000 {}",
    encode({"a": 1})[:-3],
    b"\0" * 50,
    b"%08x " % zlib.crc32(NESTED) + NESTED,
]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_no_damaged_line_passes_for_a_record(line):
    assert decode(line) is None


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    program = (
        "import asyncio, sys\n"
        "from clients.ab.log.writer import ExposureLog\n"
        f"log = ExposureLog({str(tmp_path)!r})\n"
        "async def client(c):\n"
        "    for n in range(10**9):\n"
        "        if await log.append('event', {'id': f'{c}-{n}', 'text': 'x' * 2000}):\n"
        "            sys.stdout.write(f'{c}-{n}\\n'); sys.stdout.flush()\n"
        "async def go(): await asyncio.gather(*map(client, range(8)))\n"
        "asyncio.run(go())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline().strip() for _ in range(1000)]
        process.send_signal(signal.SIGKILL)
        seen += [line.strip() for line in process.stdout if line.endswith("\n")]
    records, counts = read(tmp_path)
    assert set(seen) <= {r["id"] for r in records}
    assert len(records) == counts.records and not counts.damaged


def test_files_rotate_by_size_and_by_age(tmp_path):
    log = ExposureLog(tmp_path, rotate_bytes=2000)
    for n in range(10):
        log.write("event", {"n": n, "text": "x" * 500})
    assert 2 < len(log_files(tmp_path)) < 6
    assert [r["n"] for r in read(tmp_path)[0]] == list(range(10))
    aged = ExposureLog(tmp_path / "aged", rotate_seconds=0.0)
    for n in range(3):
        aged.write("event", {"n": n})
    assert len(log_files(tmp_path / "aged")) == 3


def test_a_file_that_gets_old_without_records_is_closed(tmp_path):
    """Seen: a router without traffic held its last file for ever, and no erasure of whoever stood in it ended."""
    log = ExposureLog(tmp_path, rotate_seconds=0.3)
    assert log.write("event", {"n": 0})
    until = time.monotonic() + 60
    while open_files(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.02)
    log.rotate_seconds = 3600.0
    assert log.write("event", {"n": 1}) and [r["n"] for r in read(tmp_path)[0]] == [0, 1]
    assert len(log_files(tmp_path)) == 2 and open_files(tmp_path) == 1
    log.close()


def test_a_file_holds_one_utc_day_even_when_midnight_passes_in_the_queue(tmp_path):
    day = 20_000 * DAY_MICROSECONDS
    clock = iter([day - 2, day - 1, day, day + 1] + [day + 2] * 20)
    log = ExposureLog(tmp_path, clock=lambda: next(clock))
    write_all(log, [{"n": n} for n in range(4)])
    log.close()
    for path in log_files(tmp_path):
        assert len({r["logged"] // DAY_MICROSECONDS for r in read_file(path, ReadCounts())}) == 1
    assert sorted(r["n"] for r in read(tmp_path)[0]) == [0, 1, 2, 3]
    assert {p.name[:10] for p in log_files(tmp_path)} >= {"2024-10-03"}


def test_a_disk_that_refuses_is_told_counted_and_recovered_from(tmp_path, monkeypatch, caplog):
    log = ExposureLog(tmp_path)
    assert log.write("event", {"n": 0})
    real = os.write

    def full(descriptor, block):
        real(descriptor, bytes(block[:5]))  # a full disk takes a part
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(os, "write", full)
    assert [log.write("event", {"n": n}) for n in (1, 2)] == [False, False]
    assert log.failures == 2 and "No space left" in log.failing
    assert caplog.text.count("No space left") == 1
    monkeypatch.setattr(os, "write", real)
    time.sleep(0.1)
    assert log.write("event", {"n": 3}) and not log.failing
    records, counts = read(tmp_path)
    assert [r["n"] for r in records] == [0, 3]
    assert counts.torn == 0 and not counts.damaged  # what the failed write left was cut off


def open_files(folder: Path) -> int:
    """Descriptors of this process that lead into the folder: others come and go with what other tests left."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it was that of this very listing
            found += str(descriptor.readlink()).startswith(f"{folder}/")
    return found


@pytest.mark.parametrize("refusing", ["flock", "fsync", "write and ftruncate"])
def test_a_file_that_cannot_be_used_is_closed_and_removed(tmp_path, monkeypatch, refusing):
    """Seen: where locks are not supported, each retry left a descriptor and an empty file, until none were left."""

    def refuse(*_args):
        raise OSError(37, "No locks available")

    log = ExposureLog(tmp_path)
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.0)
    for name in refusing.split(" and "):
        monkeypatch.setattr(writer.fcntl if name == "flock" else os, name, refuse)
    assert not any(log.write("event", {"n": n}) for n in range(20))
    assert open_files(tmp_path) == 0 and not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert log.write("event", {"n": 20}) and [r["n"] for r in read(tmp_path)[0]] == [20]


def test_a_file_whose_torn_tail_cannot_be_cut_off_is_closed(tmp_path, monkeypatch, caplog):
    log = ExposureLog(tmp_path)
    assert log.write("event", {"n": 0}) and open_files(tmp_path) == 1

    def refuse(*_args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", refuse)
    monkeypatch.setattr(os, "ftruncate", refuse)
    assert not log.write("event", {"n": 1})
    assert open_files(tmp_path) == 0 and "a torn tail stays behind" in caplog.text
    assert len(list(tmp_path.iterdir())) == 1  # what was on disk stays


def test_a_file_that_is_removed_while_open_is_noticed(tmp_path, caplog):
    """Seen: pages went on being answered as logged, into a file that no longer had a name."""
    log = ExposureLog(tmp_path)
    assert log.write("event", {"n": 0}) and log.write("event", {"n": 1})
    log_files(tmp_path)[0].unlink()
    assert log.write("event", {"n": 2}) and not log.failing
    assert [r["n"] for r in read(tmp_path)[0]] == [2] and open_files(tmp_path) == 1
    assert log.failures == 2 and "2 records on it are lost" in caplog.text
    log_files(tmp_path)[0].unlink()
    tmp_path.rmdir()  # the folder too: nothing can be written
    assert not log.write("event", {"n": 3}) and "No such file" in log.failing


def test_a_file_that_each_time_is_removed_at_once_is_a_failed_write(tmp_path, monkeypatch):
    log = ExposureLog(tmp_path)
    real = os.fdatasync

    def removed(descriptor):
        real(descriptor)
        log_files(tmp_path)[0].unlink()

    monkeypatch.setattr(os, "fdatasync", removed)
    assert not log.write("event", {"n": 0}) and log.failures == 1 and "removed while" in log.failing


def test_routers_of_one_process_number_may_start_at_once_on_one_folder(tmp_path):
    """Seen: in two containers both are process 1, and one took the other's probe of the folder away."""

    def start(_: int) -> None:
        for _ in range(200):
            ExposureLog(tmp_path).close()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, range(2)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_at_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the log"):
        ExposureLog(tmp_path / "file" / "log")
    with pytest.raises(InputError, match="no such log folder"):
        read(tmp_path / "absent")


def test_hashed_ids_are_stable_differ_by_salt_and_do_not_hold_the_id(tmp_path):
    salt = tmp_path / "salt"
    salt.write_text("0123456789abcdef0123\n")
    private = PrivacySettings(salt_file=salt, queries="hash", log_text=False).privacy()
    assert private.user("user-1") == private.user("user-1") != private.user("user-2")
    assert len(private.user("user-1")) == 32 and "user" not in private.user("user-1")
    assert private.user("user-1") != Privacy(b"another salt of 16").user("user-1")
    assert len(private.query("flights")) == 16
    assert Privacy().user("user-1") == "user-1"
    nobody = private.user("no-user-page-1")  # told apart, and never a person
    assert nobody.startswith("no-user-") and "page-1" not in nobody and nobody != private.user("no-user-page-2")
    assert Privacy(queries="drop").query("secret") == "(dropped)"


def test_weak_or_missing_salts_are_refused(tmp_path):
    (tmp_path / "short").write_text("abc")
    with pytest.raises(InputError, match="16 bytes"):
        PrivacySettings(salt_file=tmp_path / "short").privacy()
    with pytest.raises(InputError, match="cannot be read"):
        PrivacySettings(salt_file=tmp_path / "absent").privacy()
    with pytest.raises(InputError, match="give --salt-file"):
        PrivacySettings().privacy()
    assert PrivacySettings(raw_ids=True).privacy().user("u") == "u"
    with pytest.raises(InputError, match="salt"):
        Privacy(queries="hash")
