"""Compare three splits of a student's work on one server: front calls encoder (BLS), an ensemble, one model for both.

python -m benchmarks.serving.split_of_work.compare --repository model_repository --data data/msrd
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from tritonclient.grpc import model_config_pb2 as pb

from benchmarks.paired_rounds import interleaved
from benchmarks.serving.closed_loop import Ask, measure
from benchmarks.serving.rerank_lists import read_lists
from build import releases
from build.triton_config import CONFIG_NAME, as_parameters, as_text, read_config
from clients.triton.reranker import Reranker
from ranking.encoder_inputs import INPUTS
from ranking.program import run
from ranking.text import StudentFormat
from serving.temporary_server import start_triton

HERE = Path(__file__).parent


@dataclass
class Config:
    """Compare splits of work between Triton models.

    Args:
        repository: repository with a published OpenVINO student
        data: dataset folder with test judgments
        name: the student
        length: documents in a list
        clients: clients at the same time
        rounds: rounds per variant, alternating; the median counts
        seconds: length of a round
        lists: different requests
    """

    repository: Path
    data: Path
    name: str = "student"
    length: int = 48
    clients: list[int] = field(default_factory=lambda: [1, 8])
    rounds: int = 3
    seconds: float = 4.0
    lists: int = 8


def main(config: Config) -> None:
    """Serve all three splits at once, check that they agree, measure them in turns and print the table."""
    version = releases.serving_versions(config.repository, config.name)[-1]
    text = StudentFormat.of_checkpoint(config.repository / config.name / str(version))
    lists = read_lists(config.data, text, config.lists, config.length)
    with tempfile.TemporaryDirectory(prefix="split-of-work-") as folder:
        repository = Path(folder)
        variants = make_variants(config, repository, version)
        with start_triton(repository) as server:

            def client(model: str) -> Ask:
                ranker = Reranker([f"grpc://{server.grpc}"], model, deadline_ms=600_000)
                return lambda request: ranker.rank(request.query, request.titles, request.summaries).scores

            process = psutil.Process(server.pid)
            expected = client(config.name)(lists[0])
            for model in variants:
                asked = [client(model)(request) for request in lists]  # warms the shapes up
                np.testing.assert_allclose(asked[0].ravel(), expected, atol=0.02)
            measurements = {
                (clients, model): partial(measure, partial(client, model), lists, clients, config.seconds, process)
                for clients in config.clients
                for model in variants
            }
            found = interleaved(measurements, config.rounds, progress="rounds")
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f}, "
        f"lists of {config.length}\n\n"
        "| split | clients | pairs/s | p50 ms | p99 ms | CPU ms/pair |\n|---|--:|--:|--:|--:|--:|"
    )
    for (clients, model), rounds in sorted(found.items()):
        latencies = np.concatenate([r.latencies_ms for r in rounds])
        print(
            f"| {variants[model]} | {clients} | {np.median([r.pairs_per_second for r in rounds]):.0f} "
            f"| {np.percentile(latencies, 50):.0f} | {np.percentile(latencies, 99):.0f} "
            f"| {np.median([r.cpu_ms_per_pair for r in rounds]):.2f} |"
        )


def make_variants(config: Config, repository: Path, version: int) -> dict[str, str]:
    """Copy the student and add the other two beside it. Returns model name -> what it is."""
    for name in (config.name, f"{config.name}_encoder"):
        home = repository / name
        shutil.copytree(config.repository / name / str(version), home / str(version))
        shutil.copy2(config.repository / name / CONFIG_NAME, home / CONFIG_NAME)
    encoder_home = repository / f"{config.name}_encoder"
    front = read_config(repository / config.name / CONFIG_NAME)
    # no request is refused here, however slow the machine is
    front.dynamic_batching.default_queue_policy.default_timeout_microseconds = 0
    front.parameters["cached_fields"].string_value = "0"  # the same lists come again and again
    (repository / config.name / CONFIG_NAME).write_text(as_text(front), encoding="utf-8")
    encoder = read_config(encoder_home / CONFIG_NAME)
    bf16 = "HINT_BF16" in encoder.parameters

    single = variant(front, "single")
    for key, value in as_parameters({"precision": "bf16" if bf16 else "f32"}).items():
        single.parameters[key].CopyFrom(value)
    single.instance_group[0].count = 1  # each instance holds an engine of its own
    home = add(repository, single, config.name, version, "single_model.py")
    for file in ("model.xml", "model.bin"):
        shutil.copy2(encoder_home / str(version) / file, home / file)

    tokenizer = variant(front, "tokenizer")
    del tokenizer.output[:]
    for tensor in INPUTS:
        tokenizer.output.add(name=tensor, data_type=pb.TYPE_INT32, dims=[-1, -1])
    add(repository, tokenizer, config.name, version, "tokenizer_model.py")

    ensemble = pb.ModelConfig(name="ensemble", platform="ensemble")
    for tensor in front.input:
        if tensor.name in ("query", "title", "summary"):
            ensemble.input.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    ensemble.output.add(name="score", data_type=pb.TYPE_FP32, dims=[-1, 1])
    fields = [tensor.name for tensor in ensemble.input]
    ensemble.ensemble_scheduling.step.add(
        model_name="tokenizer", model_version=-1, input_map={f: f for f in fields}, output_map={t: t for t in INPUTS}
    )
    ensemble.ensemble_scheduling.step.add(
        model_name=encoder.name, model_version=-1, input_map={t: t for t in INPUTS}, output_map={"logits": "score"}
    )
    (repository / "ensemble" / "1").mkdir(parents=True)
    (repository / "ensemble" / CONFIG_NAME).write_text(as_text(ensemble), encoding="utf-8")
    return {config.name: "front calls encoder (BLS)", "ensemble": "ensemble", "single": "one model does both"}


def variant(front: pb.ModelConfig, name: str) -> pb.ModelConfig:
    """A copy of the front's config under another name."""
    made = pb.ModelConfig()
    made.CopyFrom(front)
    made.name = name
    return made


def add(repository: Path, config: pb.ModelConfig, source: str, version: int, model: str) -> Path:
    """A model whose model.py builds on the student's front. Returns its version folder."""
    home = repository / config.name / str(version)
    shutil.copytree(repository / source / str(version), home)
    (home / "model.py").rename(home / "front.py")
    shutil.copy2(HERE / model, home / "model.py")
    (repository / config.name / CONFIG_NAME).write_text(as_text(config), encoding="utf-8")
    return home


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m benchmarks.serving.split_of_work.compare --repository model_repository --data data/msrd",
    )
