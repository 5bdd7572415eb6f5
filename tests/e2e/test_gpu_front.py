"""The front as a GPU build configures it, on a real tritonserver: packed lists, and rows padded to CUDA graphs.

TensorRT needs a GPU, so the encoder behind it is the same graph in ONNX Runtime, as a model of Triton's Python backend.
It merges what Triton hands it in one batch as TensorRT's backend does: by concatenation.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from build.engine_encoder import PackedEncoder, PaddedEncoder
from build.export_onnx import export, load_encoder, torch_runner
from build.publish import publish
from build.releases import promote
from build.runners import score_pairs
from build.triton_config import CPU, GRAPH_ROWS, ServingLimits, bucket_lengths, encoder_config, front_config
from clients.rerank import Reranker
from ranking.card import ScoreCard
from ranking.prior import PriorBlend
from ranking.text import StudentFormat
from serving.temporary_server import start_triton
from tests.helpers.tiny_student import make_student

ENCODER = """
import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(Path(__file__).parent / "model.onnx"), options)
        self.names = [value.name for value in self.session.get_inputs()]

    def execute(self, requests):
        feeds = [{n: pb_utils.get_input_tensor_by_name(r, n).as_numpy() for n in self.names} for r in requests]
        if "lengths" in self.names:
            counts = [feed["lengths"].shape[1] for feed in feeds]
            feeds = [{name: value[0] for name, value in feed.items()} for feed in feeds]
        else:
            counts = [len(feed["input_ids"]) for feed in feeds]
            assert set(counts) <= {8, 16, 24, 32, 48, 64}, counts
        together = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.names}
        logits = np.split(self.session.run(None, together)[0], np.cumsum(counts)[:-1])
        if "lengths" in self.names:
            logits = [part[None] for part in logits]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("logits", part)]) for part in logits]
"""
GRAPHS = {
    "packed": ServingLimits(graph="packed", max_batch=20),
    "graphs": ServingLimits(cuda_graphs=True, max_batch=64),
}


def publish_stand_in(repository: Path, name: str, limits: ServingLimits, checkpoint: Path, folder: Path) -> None:
    """An arm with a GPU build's front, and an encoder config that only names another backend and device."""
    limits = limits.for_target("tensorrt")
    lengths = bucket_lengths(limits, "tensorrt", StudentFormat.of_checkpoint(checkpoint).max_tokens())
    model = load_encoder(checkpoint).model
    source = PackedEncoder(model, lengths[-1]) if limits.graph == "packed" else PaddedEncoder(model)
    export(source.eval(), folder / "model.onnx")
    (folder / "model.py").write_text(ENCODER)
    encoder = encoder_config(name, "tensorrt", limits, lengths, {"arm": name}, {})
    encoder.ClearField("platform")
    encoder.ClearField("optimization")  # CUDA graphs
    encoder.backend, encoder.default_model_filename = "python", "model.py"
    del encoder.instance_group[0].profile[:]
    encoder.instance_group[0].kind = CPU
    if limits.graph != "packed":
        del encoder.model_warmup[:]  # their row counts are the engine's largest, not those of the graphs
    front = front_config(name, "tensorrt", limits, lengths, {"arm": name}, PriorBlend())
    front.instance_group[0].count = 2
    judged_scores = folder / "judged_scores.npz"
    np.savez(judged_scores)  # no gate judged this stand-in
    files = [folder / "model.onnx", folder / "model.py"]
    version = publish(
        repository, name, checkpoint / "tokenizer.json", ScoreCard.load(checkpoint), files, front, encoder, {},
        judged_scores, {},
    )  # fmt: skip
    promote(repository, name, version)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-front")
    checkpoint = make_student(folder / "student", seed=1)
    for name, limits in GRAPHS.items():
        (folder / name).mkdir()
        publish_stand_in(folder / "repository", name, limits, checkpoint, folder / name)
    with start_triton(folder / "repository") as server:
        yield server, checkpoint


@pytest.mark.parametrize("name", GRAPHS)
def test_lists_of_several_callers_get_the_checkpoints_scores(served, name):
    server, checkpoint = served
    text = StudentFormat.of_checkpoint(checkpoint)
    lists = [
        (f"night {n}", [f"red queen {i}" * (i % 3) for i in range(n)], ["moon " * (7 * i % 40) for i in range(n)])
        for n in (1, 5, 23, 47)
    ]
    reranker = Reranker([f"grpc://{server.grpc}"], name, deadline_ms=60_000)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda columns: reranker.rank(*columns).scores, lists * 3))
    runner = torch_runner(load_encoder(checkpoint))
    for (query, titles, summaries), scores in zip(lists * 3, found):
        pairs = text.encode([query] * len(titles), titles, summaries)
        np.testing.assert_allclose(scores, score_pairs(runner, pairs, text.pad_id), atol=1e-4)
    assert max(GRAPH_ROWS) == 64  # the stand-in accepts these row counts alone
