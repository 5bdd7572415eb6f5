"""The labeller's parts: the window that finds itself, the candidate file in ranges, the order in which pairs are
sent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.labelling import progress_and_metrics
from clients.labelling.candidate_file import CandidateFile, RowRange
from clients.labelling.first_sample import draw_sample
from clients.labelling.label_shards import Origin, finished_record, merge_summaries, score_summary, write_shard
from clients.labelling.request_window import LARGEST, START, Window
from clients.labelling.teacher_endpoint import Patience, TeacherEndpoint
from clients.labelling.work_queue import Pair, ShardInHand, Tally, WorkQueue
from clients.triton.connection import Credentials
from ranking.errors import InputError


def test_a_run_that_nobody_watches_says_in_its_log_how_far_it_is(monkeypatch, caplog, capsys):
    """A week's run wrote two states of its bar a second into one line of a file."""
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    monkeypatch.setattr(progress_and_metrics, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(progress_and_metrics, "LINE_SECONDS", 0.0)
    caplog.set_level("INFO")

    async def watched() -> None:
        shown = asyncio.create_task(progress_and_metrics.show(Tally(total=10, already=2, scored=3)))
        end = time.monotonic() + 10
        while not caplog.records and time.monotonic() < end:
            await asyncio.sleep(0.001)
        shown.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await shown

    asyncio.run(watched())
    assert caplog.records[0].message == "5 of 10 pairs, retries 0, rejects 0"
    assert capsys.readouterr().err == ""


def settle(window: Window, now: list[float], rate_at, seconds: float) -> int:
    """Drive a window against a server that answers rate_at(limit) requests a second. Returns the limit at the end."""
    end = now[0] + seconds
    while now[0] < end:
        now[0] += 1 / rate_at(window.limit)
        window.completed(saturated=True)
    return window.limit


@pytest.mark.parametrize("capacity", [100, 200, 500])
def test_the_window_grows_to_what_the_server_can_use(capacity):
    now = [0.0]
    window = Window(clock=lambda: now[0])
    limit = settle(window, now, lambda limit: 10 * min(limit, capacity), seconds=30)
    assert capacity <= limit <= 4 * capacity


def test_one_unlucky_epoch_does_not_stop_the_climb():
    now = [0.0]
    window = Window(clock=lambda: now[0])
    slow_while_at_256 = lambda limit: 10 * min(limit, 512) / (4 if limit == 256 else 1)  # noqa: E731
    assert settle(window, now, slow_while_at_256, seconds=25) >= 512


def test_the_window_follows_a_server_that_changes():
    now = [0.0]
    window = Window(clock=lambda: now[0])
    assert settle(window, now, lambda limit: 20 * min(limit, 16), seconds=29) <= 2 * START
    assert settle(window, now, lambda limit: 20 * min(limit, 900), seconds=150) >= 900


def test_an_overload_halves_the_window_once_and_it_recovers():
    now = [0.0]
    window = Window(clock=lambda: now[0])
    limit = settle(window, now, lambda limit: 10 * min(limit, 128), seconds=30)
    for _ in range(50):
        window.overloaded()
    assert window.limit == limit // 2
    assert settle(window, now, lambda limit: 10 * min(limit, 128), seconds=30) >= 128


def test_an_idle_window_does_not_judge_and_a_fixed_one_does_not_move():
    now = [0.0]
    window, fixed = Window(clock=lambda: now[0]), Window(7, clock=lambda: now[0])
    for _ in range(10_000):
        now[0] += 0.01
        window.completed(saturated=False)
        fixed.completed(saturated=True)
        fixed.overloaded()
    assert (window.limit, fixed.limit) == (START, 7)
    assert settle(window, now, lambda limit: 20.0 * limit, seconds=12) == LARGEST


class TeacherOfSixteen:
    """Scores nothing; a request is its number of pairs."""

    documents_per_request, one_query_a_request, head_dtype = 16, False, "float32"

    class Request(int):
        id = ""

    def request(self, texts: list) -> Request:
        return self.Request(len(texts))


@pytest.mark.parametrize(("limit", "full"), [(32, 16), (50, 16), (16, 16), (10, 10)])
def test_one_short_request_leaves_no_others_short(limit, full):
    """The queue runs short once, at the fifth pair: what follows goes in full requests, never above the window."""
    sizes, in_flight = [], []

    async def draw() -> None:
        work = WorkQueue()
        endpoint = TeacherEndpoint(
            "127.0.0.1:1", Credentials(), TeacherOfSixteen(), work, Tally(), Patience(), Window(limit)
        )
        endpoint._heard = 1.0

        class Stream:
            async def write(self, request) -> None:
                sizes.append(int(request))
                in_flight.append(endpoint._pairs_in_flight)

        sender = asyncio.ensure_future(endpoint._send(Stream()))
        for pairs in (5, 400):
            await work.put([Pair(None, 0, (b"",)) for _ in range(pairs)], room=1000)
            for _ in range(20):
                await asyncio.sleep(0)
        while endpoint._in_flight:  # answered one by one, the oldest first
            answered, _ = endpoint._in_flight.pop(next(iter(endpoint._in_flight)))
            endpoint._count_in_flight(-len(answered))
            endpoint._room.set()
            for _ in range(20):
                await asyncio.sleep(0)
        sender.cancel()

    asyncio.run(draw())
    assert sum(sizes) == 405 and max(in_flight) <= limit
    assert sizes[0] == 5 and set(sizes[1:-1]) == {full}


@pytest.mark.parametrize("shard_rows", [1, 7, 100, 2500])
def test_ranges_cover_every_row_once_however_the_file_is_cut(write_candidates, shard_rows):
    path = write_candidates(2100)
    file = CandidateFile.open(path)
    ranges = file.ranges(shard_rows)
    assert sum(r.rows for r in ranges) == 2100
    rows = pa.concat_tables(rows for _, rows, refused in file.read(ranges) if not refused)
    assert rows.column("title").to_pylist() == [f"title {i}" for i in range(2100)]


def test_ranges_far_apart_are_read_without_what_lies_between(write_candidates):
    file = CandidateFile.open(write_candidates(9000))
    wanted = [RowRange(0, 10, 5), RowRange(7, 4990, 15), RowRange(9, 8999, 1)]
    titles = [rows.column("title").to_pylist() for _, rows, _ in file.read(wanted)]
    assert titles == [[f"title {r.first_row + i}" for i in range(r.rows)] for r in wanted]


def test_an_empty_candidate_file_has_no_ranges(write_candidates):
    assert CandidateFile.open(write_candidates(0)).ranges(10) == []


def test_the_fingerprint_tells_files_apart_but_not_places(write_candidates, tmp_path):
    path = write_candidates(50)
    moved = tmp_path / "moved.parquet"
    moved.write_bytes(path.read_bytes())
    assert CandidateFile.open(moved).fingerprint == CandidateFile.open(path).fingerprint
    table = pq.read_table(path)
    pq.write_table(table.set_column(3, "title", pa.array(["other"] * 50)), moved)
    assert CandidateFile.open(moved).fingerprint != CandidateFile.open(path).fingerprint


def test_a_querys_candidates_are_sent_side_by_side():
    rows = pa.table({"query": ["b", "a", "b", None, "c", "a"]})
    shard = ShardInHand(RowRange(0, 0, 6), rows, {3: "query is null"})
    assert shard.sending_order() == [0, 2, 1, 5, 4]


def test_a_shard_with_a_nan_is_never_written(write_candidates, tmp_path):
    file = CandidateFile.open(write_candidates(3))
    ((covered, rows, _),) = file.read(file.ranges(3))
    scores = np.array([1.0, np.nan, 2.0], np.float32)
    with pytest.raises(ValueError, match="do not cover"):
        write_shard(tmp_path, Origin.of(file, 3, "t"), covered, rows, scores, [])
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_another_teacher_does_not_count_as_finished(write_candidates, tmp_path):
    file = CandidateFile.open(write_candidates(3))
    ((covered, rows, _),) = file.read(file.ranges(3))
    write_shard(tmp_path, Origin.of(file, 3, "t"), covered, rows, np.zeros(3, np.float32), [])
    assert finished_record(tmp_path, Origin.of(file, 3, "t"), covered)[0] is not None
    record, problem = finished_record(tmp_path, Origin.of(file, 3, "u"), covered)
    assert record is None and "another teacher" in problem


def test_summaries_merge_to_the_summary_of_all():
    scores = np.random.default_rng(0).normal(0, 4, 1000).astype(np.float32)
    merged = merge_summaries(score_summary(scores[:300]), score_summary(scores[300:]))
    whole = score_summary(scores)
    assert merged["bins"] == whole["bins"] and merged["count"] == 1000
    assert merged["sum"] == pytest.approx(whole["sum"]) and merged["min"] == whole["min"]


def test_a_metrics_port_that_cannot_be_had_is_named():
    """Seen: a traceback, where a second labeller of the machine was given the first one's port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 99999):
            with pytest.raises(InputError, match=f"metrics cannot be served on 127.0.0.1, port {port}: "):
                progress_and_metrics.serve_metrics(Tally(), port, "127.0.0.1")


def test_a_pair_that_stands_in_two_parts_of_the_file_is_once_in_a_sample_of_all(write_candidates, tmp_path):
    """Seen: the sample was refused for a duplicate key, which labelling itself does not look for that far apart."""
    half = pq.read_table(write_candidates(3000))
    pq.write_table(pa.concat_tables([half, half]), tmp_path / "candidates.parquet")
    candidates = CandidateFile.open(tmp_path / "candidates.parquet")
    drawn = draw_sample(candidates, 6000, stratify=True, seed=0, path=tmp_path / "sample.parquet")
    assert 0 < drawn <= 3000
