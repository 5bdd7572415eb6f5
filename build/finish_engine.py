"""Finish a TensorRT build that build_student.py staged: engine, gate on the GPU, publication. Needs no torch.

    python build/finish_engine.py --staged runs/engine/student --repository model_repository

Only the TensorRT version that built an engine loads it, so it runs in the TensorRT container of the server's release:
`docker compose run --rm build-engine --staged ...` (deploy/engine.Dockerfile). What was staged with --no-promote is
published and does not serve.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from build import tensorrt_engine
from build.engine_inspector import AttentionReport, read_attention, softmax_nodes
from build.gate import GateLimits, Reference, gate_scores
from build.probabilities import ProbabilityMaps
from build.publication_settings import PublicationSettings
from build.publish import publish_engine, refusal
from build.quality_gate import JUDGED_SCORES_NAME
from build.releases import check_holds_no_teacher
from build.runners import score_documents
from build.triton_config import ServingLimits
from ranking.card import fingerprint
from ranking.errors import InputError, Refused
from ranking.files import replacing_folder, write_json
from ranking.program import run
from ranking.text import EncodedDocuments, EncodedPairs

LOGGER = logging.getLogger(__name__)
STAGE_NAME, PAIRS_NAME, GRAPH_NAME = "stage.json", "gate.npz", "cast.onnx"
WAYS_TO_FUSE = (
    "TensorRT fuses attention in fp16, not in fp32, and where it finds that faster: stage the build with "
    "--precision fp16, --serving.graph fused, --serving.half-softmax true"
)


@dataclass
class Config(PublicationSettings):
    """Finish a staged TensorRT build on the machine that serves it.

    Args:
        staged: folder that build_student.py --target tensorrt wrote
        timing_cache: TensorRT's timing cache; keep it between builds
        workspace_gib: scratch memory that TensorRT may use while building
    """

    staged: Path
    timing_cache: Path = Path("runs/tensorrt-timing.cache")
    workspace_gib: float = 4.0


def stage(
    folder: Path,
    checkpoint: Path,
    graph: Path,
    documents: EncodedDocuments,
    reference: Reference,
    judged_scores: Path,
    pad_id: int,
    facts: dict[str, Any],
) -> Path:
    """Write everything that finish() needs into `folder`, replacing an older stage. Returns the folder.

    documents: [n], the judged documents of `reference`; judged_scores: file that the version keeps; facts: what
    build_student.py knows of the build, plain JSON.
    """
    with replacing_folder(folder) as aside:
        shutil.copy2(graph, aside / GRAPH_NAME)
        shutil.copy2(judged_scores, aside / JUDGED_SCORES_NAME)
        shutil.copy2(checkpoint / "tokenizer.json", aside / "tokenizer.json")
        pairs = documents.together
        np.savez_compressed(
            aside / PAIRS_NAME,
            ids=pairs.ids,
            document_starts=pairs.document_starts,
            lengths=pairs.lengths,
            chunk_starts=documents.starts,
            reference=reference.scores,
            grades=reference.grades,
            groups=reference.groups,
        )
        staged = {
            **facts,
            "graph": fingerprint(graph),
            "queries": reference.queries,
            "pad_id": pad_id,
            "chunk_pooling": documents.pooling,
        }
        write_json(aside / STAGE_NAME, staged)
    return folder


def main(config: Config) -> None:
    """Build, gate and publish. InputError where TensorRT is not installed, with the command to run instead."""
    check_tensorrt(container_command(config.staged, config.repository))
    finish(config)


def check_tensorrt(command: str) -> None:
    """InputError unless TensorRT's Python module is here, in the version of the server that will load the engine.

    command: what builds in the container. The file that SERVING_TENSORRT names lists the library files of the server's
    TensorRT (deploy/engine.Dockerfile writes it); without the variable any version will do.
    """
    listed = os.environ.get("SERVING_TENSORRT")
    wanted = _server_versions(Path(listed)) if listed else set()
    if not tensorrt_engine.is_available():
        if not listed:
            raise InputError(f"TensorRT is not installed here; run:\n{command}")
        raise InputError(
            f"this image has no Python module tensorrt; the server's TensorRT is {', '.join(sorted(wanted))}: build "
            "the image with MORE_PACKAGES naming the bindings of that version (deploy/engine.Dockerfile)"
        )
    found = tensorrt_engine.version()
    if wanted and ".".join(found.split(".")[:3]) not in wanted:
        raise InputError(
            f"TensorRT {found} is installed here, the server has {', '.join(sorted(wanted))}, and an engine is loaded "
            "only by the version that built it: build both images of one RELEASE (compose.yaml)"
        )


def _server_versions(listed: Path) -> set[str]:
    """Versions such as 11.1.0 from lines such as libnvinfer.so.11.1.0."""
    try:
        names = listed.read_text(encoding="utf-8").split()
    except OSError as problem:
        raise InputError(f"SERVING_TENSORRT: {listed}: cannot be read: {problem}") from problem
    versions = {name.partition(".so.")[2] for name in names if name.startswith("libnvinfer.so.")}
    if not versions:
        raise InputError(f"SERVING_TENSORRT: {listed} names no libnvinfer.so: the serving image has no TensorRT")
    return versions


def finish(config: Config) -> int:
    """Build, gate and publish. Returns the version. InputError if the engine fails the gate."""
    facts, documents, reference = read_stage(config.staged)
    check_holds_no_teacher(config.repository / facts["name"])
    limits = ServingLimits(**facts["serving"])
    gate_limits = GateLimits(**facts["gate_limits"])
    plan = tensorrt_engine.plan_for(limits, facts["lengths"], config.workspace_gib, facts["inputs"])
    with tempfile.TemporaryDirectory(prefix="finish-engine-") as folder:
        LOGGER.info("building the engine: %s", plan)
        engine = tensorrt_engine.build_engine(config.staged / GRAPH_NAME, folder, plan, config.timing_cache)
        attention = check_attention(engine, config.staged / GRAPH_NAME, gate_limits, facts["name"])
        runner = tensorrt_engine.engine_runner(engine, plan)
        scores = score_documents(runner, documents, facts["pad_id"], "TensorRT")
        report = gate_scores(reference, scores, facts["precision"], gate_limits)
        if not report.passed and not facts["accept_drop"]:
            raise Refused(refusal(facts["name"], [report]))
        return publish_engine(
            config.repository,
            facts | {"attention": attention.as_json()},
            config.staged,
            [engine],
            report,
            parameters={},
            judged_scores=config.staged / JUDGED_SCORES_NAME,
            promote_it=config.promote and facts.get("promote", True),
        )


def check_attention(engine: Path, graph: Path, limits: GateLimits, name: str) -> AttentionReport:
    """What the engine made of the graph's attention. Unless that is fused, a warning; InputError where limits say so.

    name: of the arm, for the messages.
    """
    nodes = softmax_nodes(graph)
    try:
        report = read_attention(tensorrt_engine.engine_information(engine), nodes)
    except InputError as problem:  # a release that writes it in another way must not stop builds
        LOGGER.warning("%s", problem)
        report = AttentionReport(0, len(nodes), fused=[], unfused=[], unknown=nodes)
    if report.all_fused:
        LOGGER.info("%s", report.line())
        return report
    if limits.require_fused_attention:
        raise Refused(
            f"{name} is not published: {report.line()}; {WAYS_TO_FUSE}, or stage it again without "
            "--gate.require-fused-attention"
        )
    LOGGER.warning("%s. This moves no score, but makes an engine slower: %s", report.line(), WAYS_TO_FUSE)
    return report


def read_stage(folder: Path) -> tuple[dict[str, Any], EncodedDocuments, Reference]:
    """Facts, encoded documents [n] and their fp32 scores, as stage() wrote them.

    InputError if the folder is incomplete.
    """
    try:
        facts = json.loads((folder / STAGE_NAME).read_text(encoding="utf-8"))
        with np.load(folder / PAIRS_NAME) as stored:
            arrays = dict(stored)
    except (OSError, ValueError) as problem:
        raise InputError(f"{folder}: not a staged build: {problem}") from problem
    if fingerprint(folder / GRAPH_NAME) != facts["graph"]:
        raise InputError(f"{folder / GRAPH_NAME}: not the graph that passed the gate; stage the build again")
    pairs = EncodedPairs(arrays["ids"], arrays["lengths"], arrays["document_starts"])
    documents = EncodedDocuments(pairs, arrays["chunk_starts"], facts["chunk_pooling"])
    maps = ProbabilityMaps(**facts["probabilities"])
    calibration = maps.alone if maps.served else None
    reference = Reference(arrays["reference"], arrays["grades"], arrays["groups"], facts["queries"], calibration)
    return facts, documents, reference


def container_command(staged: Path, repository: Path) -> str:
    """The command that finishes the build inside NVIDIA's container, from the repository root."""
    return f"docker compose run --rm build-engine --staged {staged} --repository {repository}"


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python build/finish_engine.py --staged runs/engine/student --repository model_repository",
    )
