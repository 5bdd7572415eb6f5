"""A served ranker as teacher: several documents a request, the same guarantees, one document at fault found alone."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tritonclient.grpc import service_pb2 as pb

from clients.labelling.served_ranker import ServedRanker
from clients.labelling.work_queue import Pair, WorkQueue
from ranking.labels import LabelSet, iter_labelled, read_labels

ROWS = 1000
RANKER = ("--teacher-kind", "ranker", "--shard-rows", "250")

_spec = importlib.util.spec_from_file_location(
    "stub_teacher", Path(__file__).parents[2] / "helpers" / "stub_teacher.py"
)
assert _spec is not None and _spec.loader is not None
stub_teacher = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stub_teacher)


def expected_scores(rows: pa.Table) -> list[float]:
    return [
        stub_teacher.stub_score("\n".join((row["query"], row["title"], row["summary"])).encode())
        for row in rows.to_pylist()
    ]


def test_every_pair_gets_its_own_score_under_the_checkpoints_fingerprint(write_candidates, label, start_stub, tmp_path):
    candidates = write_candidates(ROWS)
    server = start_stub("--ranker", "--teacher-id", "abc123")
    code, text = label.run(candidates, tmp_path / "labels", "--url", server.url, *RANKER)
    assert code == 0, text
    rows = pa.concat_tables(iter_labelled(candidates, tmp_path / "labels"))
    assert rows.column("teacher_score").to_pylist() == expected_scores(rows)
    assert LabelSet.load(tmp_path / "labels").teacher_id == "abc123-fp32"


def test_failures_of_whole_requests_leave_no_trace(write_candidates, label, start_stub, tmp_path):
    candidates = write_candidates(ROWS)
    server = start_stub("--ranker", "--latency", "0.01", "--error-rate", "0.1", "--drop-rate", "0.005")
    code, text = label.run(candidates, tmp_path / "labels", "--url", server.url, "--retries", "8", *RANKER)
    assert code == 0, text
    rows = pa.concat_tables(iter_labelled(candidates, tmp_path / "labels"))
    assert len(rows) == ROWS and rows.column("teacher_score").to_pylist() == expected_scores(rows)


def test_a_document_that_the_model_refuses_takes_no_other_with_it(write_candidates, label, start_stub, tmp_path):
    candidates = write_candidates(ROWS)
    server = start_stub("--ranker", "--final-mark", "title 77\n")
    code, text = label.run(candidates, tmp_path / "labels", "--url", server.url, *RANKER)
    assert code == 3, text
    (reject,) = pq.read_table(tmp_path / "labels" / "rejects.parquet").to_pylist()
    assert (reject["row"], reject["query_id"], reject["doc_id"]) == (78, "q9", "d5")
    assert len(read_labels(tmp_path / "labels")) == ROWS - 1


def test_scores_of_a_version_with_another_checkpoint_are_not_taken(write_candidates, label, start_stub, tmp_path):
    candidates = write_candidates(ROWS)
    steady = start_stub("--ranker", "--latency", "0.05", "--capacity", "2")
    changing = start_stub("--ranker", "--latency", "0.01", "--promote-after", "20", "--promoted-id", "another")
    code, text = label.run(candidates, tmp_path / "labels", "--url", f"{steady.url},{changing.url}", *RANKER)
    assert code == 0 and "it serves teacher another-fp32, this run is of stub0-fp32" in text, text
    rows = pa.concat_tables(iter_labelled(candidates, tmp_path / "labels"))
    assert rows.column("teacher_score").to_pylist() == expected_scores(rows)


def test_a_decoder_is_not_labelled_with_as_a_ranker(write_candidates, label, stub, tmp_path):
    code, text = label.run(write_candidates(10), tmp_path, "--url", stub.url, *RANKER)
    assert code == 1 and "does not say which checkpoint it serves" in text


def test_pairs_of_a_query_share_a_request_until_one_has_failed():
    queue = WorkQueue()
    pairs = [Pair(None, i, (query, b"t", b"s")) for i, query in enumerate([b"a", b"a", b"a", b"b", b"b"])]
    pairs[1].failures = 1

    async def draw() -> list[list[int]]:
        await queue.put(pairs, room=10)
        return [[pair.position for pair in await queue.get(most=2)] for _ in range(4)]

    assert asyncio.run(draw()) == [[0], [1], [2], [3, 4]]


def test_prompts_of_several_queries_share_a_request_in_order():
    queue = WorkQueue()

    async def draw() -> list[list[int]]:
        await queue.put([Pair(None, i, (b"prompt %d" % i,)) for i in range(5)], room=10)
        return [[pair.position for pair in await queue.get(most=3, one_query=False)] for _ in range(2)]

    assert asyncio.run(draw()) == [[0, 1, 2], [3, 4]]


def test_a_request_carries_one_query_and_its_documents():
    ranker = ServedRanker("encoder", "x-fp32")
    texts = ranker.texts(Path("nowhere"))(["q", "q"], ["é", "b"], ["", "\ud800"])
    request = ranker.request(texts)
    assert [(i.name, list(i.shape)) for i in request.inputs] == [("query", [1]), ("title", [2]), ("summary", [2])]
    assert [stub_teacher.unpack(raw) for raw in request.raw_input_contents] == [
        [b"q"],
        ["é".encode(), b"b"],
        [b"", b"?"],
    ]
    answer = pb.ModelInferResponse()
    answer.outputs.add(name="score", datatype="FP32", shape=[2])
    answer.raw_output_contents.append(np.array([1.5, -2.0], "<f4").tobytes())
    assert ranker.scores(answer, 2) == [1.5, -2.0]
    assert ranker.scores(answer, 3) == [None, None, None]
