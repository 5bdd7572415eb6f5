"""Finish a TensorRT build that build_student.py staged: engine, gate on the GPU, publication. Needs no torch.

    python build/finish_engine.py --staged runs/engine/student --repository model_repository

Run it inside the container that will serve the engine: only the TensorRT version that built an engine loads it.
`docker compose run --rm build-engine --staged ...` does so.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from build import tensorrt_engine
from build.gate import GateLimits, GateReport, compare
from build.publish import publish_engine, refusal
from build.runners import score_pairs
from build.tensorrt_engine import EnginePlan
from build.triton_config import ServingLimits
from ranking.card import CARD_NAME, fingerprint
from ranking.errors import InputError
from ranking.files import replacing_folder, write_json
from ranking.program import run
from ranking.text import EncodedPair

LOGGER = logging.getLogger(__name__)
STAGE_NAME, PAIRS_NAME, GRAPH_NAME = "stage.json", "gate.npz", "cast.onnx"


@dataclass
class Config:
    """Finish a staged TensorRT build on the machine that serves it.

    Args:
        staged: folder that build_student.py --target tensorrt wrote
        repository: Triton model repository to publish into
        timing_cache: TensorRT's timing cache; keep it between builds
        workspace_gib: scratch memory that TensorRT may use while building
        promote: serve the new version at the next start or load
    """

    staged: Path
    repository: Path = Path("model_repository")
    timing_cache: Path = Path("runs/tensorrt-timing.cache")
    workspace_gib: float = 4.0
    promote: bool = True


def stage(
    folder: Path, checkpoint: Path, graph: Path, pairs: list[EncodedPair], arrays: dict[str, Any], facts: dict[str, Any]
) -> Path:
    """Write everything that the second half needs into `folder`, replacing an older stage. Returns it."""
    with replacing_folder(folder) as aside:
        shutil.copy2(graph, aside / GRAPH_NAME)
        for file in ("tokenizer.json", CARD_NAME):
            shutil.copy2(checkpoint / file, aside / file)
        np.savez_compressed(
            aside / PAIRS_NAME,
            ids=np.concatenate([pair.ids for pair in pairs]).astype(np.int32),
            document_starts=np.asarray([pair.document_start for pair in pairs], np.int32),
            lengths=np.asarray([len(pair.ids) for pair in pairs], np.int32),
            **arrays,
        )
        write_json(aside / STAGE_NAME, facts)
    return folder


def main(config: Config) -> None:
    if not tensorrt_engine.is_available():
        raise InputError(f"TensorRT is not installed here; run:\n{container_command(config.staged, config.repository)}")
    finish(config)


def finish(config: Config) -> int:
    """Build, gate and publish. Returns the version. InputError if the engine fails the gate."""
    facts, pairs, arrays = read_stage(config.staged)
    limits = ServingLimits(**facts["serving"])
    plan = EnginePlan(
        tuple(facts["lengths"]), limits.max_batch, max(1, limits.max_batch * 3 // 4), config.workspace_gib
    )
    with tempfile.TemporaryDirectory(prefix="finish-engine-") as folder:
        LOGGER.info("building the engine: %d profiles, batch to %d", len(plan.lengths), plan.max_batch)
        engine = tensorrt_engine.build_engine(config.staged / GRAPH_NAME, folder, plan, config.timing_cache)
        runner = tensorrt_engine.engine_runner(engine, plan)
        scores = score_pairs(runner, pairs, facts["pad_id"], "TensorRT")
        report = gate(facts, arrays, scores)
        if not report.passed and not facts["accept_drop"]:
            raise InputError(refusal(facts["name"], [report]))
        return publish_engine(
            config.repository, facts, config.staged, [engine], report, parameters={}, promote_it=config.promote
        )


def gate(facts: dict[str, Any], arrays: dict[str, np.ndarray], scores: np.ndarray) -> GateReport:
    report = compare(
        arrays["reference"],
        scores,
        arrays["grades"],
        arrays["groups"],
        facts["queries"],
        facts["precision"],
        GateLimits(**facts["gate_limits"]),
    )
    LOGGER.info("gate: %s", report.line())
    return report


def read_stage(folder: Path) -> tuple[dict[str, Any], list[EncodedPair], dict[str, np.ndarray]]:
    """Facts, encoded pairs, and the arrays reference, grades, groups. InputError if the folder is no whole stage."""
    try:
        facts = json.loads((folder / STAGE_NAME).read_text(encoding="utf-8"))
        with np.load(folder / PAIRS_NAME) as stored:
            arrays = dict(stored)
    except (OSError, ValueError) as problem:
        raise InputError(f"{folder}: not a staged build: {problem}") from problem
    if fingerprint(folder / GRAPH_NAME) != facts["graph"]:
        raise InputError(f"{folder / GRAPH_NAME}: not the graph that passed the gate; stage the build again")
    ends = np.cumsum(arrays["lengths"])
    pairs = [
        EncodedPair(arrays["ids"][end - n : end].tolist(), int(start))
        for n, end, start in zip(arrays["lengths"], ends, arrays["document_starts"])
    ]
    return facts, pairs, arrays


def container_command(staged: Path, repository: Path) -> str:
    """The command that finishes the build inside NVIDIA's container, from the repository root."""
    return f"docker compose run --rm build-engine --staged {staged} --repository {repository}"


if __name__ == "__main__":
    example = "python build/finish_engine.py --staged runs/engine/student --repository model_repository"
    run(main, Config, example=example)
