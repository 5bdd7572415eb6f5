"""Checkpoint -> ONNX -> engine -> gate -> a numbered version of a Triton model.

    python build/build_student.py --checkpoint runs/world/student --name student --target openvino --data data/world

The engine is TensorRT (`tensorrt`, for a GPU) or OpenVINO (`openvino`, for a CPU). Every precision that the hardware
computes in is built, and scores real judged queries beside the fp32 checkpoint (build/gate.py); INT8 in groups only
where whole INT8 fails, there is no bf16, and the CPU has VNNI. The fastest precision that passes is published; if none
passes, nothing is. On a machine without TensorRT the build is staged, and the command that finishes it inside NVIDIA's
container is printed.

Before any engine is built, the checkpoint's own ranking is compared with what ranks today: the first stage (BM25, or
--first-stage) and the arm that serves (build/quality_gate.py). An arm that is worse is refused too.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from build import openvino_engine, tensorrt_engine
from build.batch_invariance import shapes_that_move_scores
from build.cascade import FirstArm, measure_cost, read_first_arm
from build.engine_encoder import EngineEncoder, PackedEncoder, PaddedEncoder
from build.export_onnx import Encoder, export, load_encoder, parity, torch_runner, widen_positions
from build.finish_engine import Config as FinishConfig
from build.finish_engine import container_command, finish, stage
from build.gate import GateLimits, GateReport, Reference, gate_ece, gate_scores
from build.group_quantisation import build_group_ir, fitting_groups
from build.judged_pairs import JudgedPairs, read_candidates, read_judged
from build.mixed_precision import build_mixed_ir
from build.probabilities import ProbabilityMaps, fit_maps
from build.publication_settings import PublicationSettings, check_model_name
from build.publish import publish_engine, refusal, tools
from build.quality_gate import JUDGED_SCORES_NAME, QualityReport, measure_quality, save_scores, serving_arm
from build.reference_scores import reference_of
from build.releases import check_holds_no_teacher
from build.runners import Runner, score_documents
from build.triton_config import ServingLimits, Target, bucket_lengths
from ranking.card import ScoreCard, fingerprint
from ranking.cascade import Cascade
from ranking.encoder_families import longest_input
from ranking.encoder_inputs import chosen, inputs_of, without_padding
from ranking.errors import InputError, Refused
from ranking.first_stage import BM25_NAME, first_stage_scores
from ranking.program import run
from ranking.text import EncodedPairs, StudentFormat
from ranking.visible import is_visible

LOGGER = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8", "int8_groups", "int8_mixed"]
SPEED_PAIRS = 192  # judged pairs that a precision's speed is measured on
INVARIANCE_PAIRS = 512  # judged pairs that shapes of calls are tried on


@dataclass
class Config(PublicationSettings):
    """Build a student or baseline checkpoint into a versioned Triton model.

    Args:
        checkpoint: student or baseline checkpoint folder
        name: name of the Triton model, and the arm in its metrics: student, baseline, or a further arm
        target: "tensorrt" for NVIDIA GPUs, "openvino" for CPUs
        data: dataset folder whose judgments the build is gated on
        split: judgments to gate on
        precision: "auto" builds every precision the hardware computes in and publishes the fastest that passes the gate
        gate: what a build may cost; see docs/build.md before widening
        gate_queries: judged queries to gate on, drawn at random with a fixed seed
        calibration_pairs: candidates that INT8 is calibrated on
        reference_pairs: candidates whose scores the version keeps, for ab_watch to compare live ones with
        accept_drop: publish although the engine moved the ranking; the objections are recorded in the manifest
        first_stage: what ranks before any model, as a Parquet table query_id, doc_id, prior of the judged pairs; BM25
            when left out. The arm is compared with it, and its weight as a prior is fitted on it
        serves_now: arm of the repository that serves today and is compared with too; this arm's own serving version
            when left out, "none" for no such comparison
        callers_send_prior: all callers will send the first stage's score with each document, so the gate judges the arm
            with it and not the model alone
        cascade_first: a smaller arm of the repository that scores every document, so that this checkpoint scores the
            best cascade_k of a list alone; its serving version becomes a part of the new one (OpenVINO)
        cascade_k: documents of a list that this checkpoint scores in a cascade
        accept_worse: publish although the arm is worse than what ranks today; the reason, kept in the manifest
        serving: limits and sizes of the served model
        staging: folder for a TensorRT build that a container finishes
    """

    checkpoint: Path
    name: str
    target: Target
    data: Path
    split: Literal["train", "dev", "test"] = "dev"
    precision: Precision = "auto"
    gate: GateLimits = field(default_factory=GateLimits)
    gate_queries: int = 200
    calibration_pairs: int = 256
    reference_pairs: int = 1000
    accept_drop: bool = False
    first_stage: Path | None = None
    serves_now: str = ""
    callers_send_prior: bool = False
    cascade_first: str = ""
    cascade_k: int = 12
    accept_worse: str = ""
    serving: ServingLimits = field(default_factory=ServingLimits)
    staging: Path = Path("runs/engine")

    def __post_init__(self) -> None:
        check_model_name(self.name)
        offered = {"openvino": ("auto", *openvino_engine.PRECISIONS), "tensorrt": ("auto", *tensorrt_engine.PRECISIONS)}
        if self.precision not in offered[self.target]:
            raise ValueError(f"precision {self.precision}: {self.target} offers {', '.join(offered[self.target])}")
        if self.target == "tensorrt" and self.serving.score_cache_mb:
            raise ValueError(
                "score_cache_mb: TensorRT's calls hold whatever lists came at the same time, so a kept score would not "
                "be the one that is computed; leave it out for --target tensorrt"
            )
        if self.cascade_first and self.target == "tensorrt":
            raise ValueError("cascade_first: cascades are built for --target openvino alone")
        if self.cascade_first == self.name:
            raise ValueError(
                f"cascade_first is {self.name}, the arm itself: publish the small model under another name"
            )
        for name in ("gate_queries", "calibration_pairs", "reference_pairs", "cascade_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1 is needed")
        if self.accept_worse != "" and not is_visible(self.accept_worse):
            raise ValueError("accept_worse is blank: say why the arm is published although it is worse")
        self.serving = self.serving.for_target(self.target)


@dataclass
class Build:
    """What every engine of this build shares: the checkpoint as ONNX, and the judged pairs with their fp32 scores."""

    config: Config
    card: ScoreCard
    text: StudentFormat
    onnx: Path
    parity_error: float
    judged: JudgedPairs  # the documents that the gate scores
    reference: Reference
    quality: QualityReport
    probabilities: ProbabilityMaps
    live_reference: dict[str, Any]  # scores and text figures of candidates, for ab_watch
    judged_scores: Path  # file that the version keeps
    lengths: list[int]  # bucket lengths in tokens, ascending
    positions: int  # tokens of the longest input that the network takes
    inputs: tuple[str, ...]  # of the padded graph
    first: FirstArm | None  # the small arm of a cascade
    cascade: dict[str, Any] | None  # what the manifest says of it

    def gate(self, runner: Runner, precision: str) -> GateReport:
        """Score the judged pairs with an engine and measure them against the fp32 checkpoint's scores."""
        scores = score_documents(runner, self.judged.documents, self.text.pad_id, precision)
        return gate_scores(self.reference, scores, precision, self.config.gate)


@dataclass
class CpuEngine:
    """One precision of an OpenVINO build; known: what the manifest says of it besides its speed."""

    precision: str
    ir: Path
    runner: Runner
    pairs_per_second: float
    known: dict[str, float]

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it, without the gate's figures; plain JSON."""
        return self.known | {"pairs_per_second": round(self.pairs_per_second, 1)}


def main(config: Config) -> None:
    """Build, gate and publish one student. Refused, with nothing published, if it is worse or no precision passes."""
    check_holds_no_teacher(config.repository / config.name)
    for chatty in ("onnx_ir", "onnxscript", "nncf"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="build-student-") as folder:
        build = prepare(config, Path(folder))
        if config.target == "openvino":
            build_openvino(build, Path(folder))
        else:
            build_tensorrt(build, Path(folder))


def prepare(config: Config, folder: Path) -> Build:
    """Export, check the export, and score the judged pairs with the checkpoint itself."""
    text = StudentFormat.of_checkpoint(config.checkpoint)
    card = served_card(ScoreCard.load(config.checkpoint), config.serving.max_chunks)
    text = type(text)(text.tokenizer, card.limits, card.chunking)
    if config.cascade_first and card.chunking.most > 1:
        raise InputError(
            f"cascade_first: {config.checkpoint} reads up to {card.chunking.most} chunks of a document, a cascade one: "
            "give --serving.max-chunks 1, or publish the student without cascade_first"
        )
    vocabulary = fingerprint(config.checkpoint / "tokenizer.json")
    if card.vocabulary and card.vocabulary != vocabulary:
        raise InputError(
            f"{config.checkpoint}: the card names tokenizer {card.vocabulary}, the folder holds {vocabulary}"
        )
    encoder = load_encoder(config.checkpoint)
    longest, positions = text.max_tokens(), longest_input(encoder.model.config)
    if longest > positions:
        raise InputError(f"{config.checkpoint}: pairs of up to {longest} tokens, the model has {positions} positions")
    if encoder.inputs != inputs_of(text.token_types):
        raise InputError(f"{config.checkpoint}: tokenizer and model do not agree on whether there are token types")
    if encoder.model.config.vocab_size < text.tokenizer.get_vocab_size():
        raise InputError(f"{config.checkpoint}: the tokenizer has more tokens than the model has embeddings")
    positions = widen_positions(encoder)
    judged = read_judged(config.data, config.split, text, config.gate_queries)
    scores = score_documents(torch_runner(encoder), judged.documents, text.pad_id, "fp32 checkpoint")
    if not np.isfinite(scores).all():
        raise InputError(f"{config.checkpoint}: the checkpoint itself gives scores that are not finite")
    reference = Reference(scores, judged.grades, judged.groups, judged.queries)
    first_stage = first_stage_scores(config.first_stage, config.data, judged.table)
    first, cascade, served = join_cascade(config, judged, reference)
    quality = judge_quality(config, judged, served, first_stage)
    # the card's map is of the large model's scores, which most documents of a cascade do not have
    probabilities = fit_maps(None if first else card.calibration, served, first_stage, quality.prior)
    if cascade:
        cascade["ece"] = gate_ece(replace(served, calibration=probabilities.alone), served.scores)
    elif probabilities.served:
        reference = replace(reference, calibration=probabilities.alone)
    live_reference = reference_of(config.data, text, torch_runner(encoder), config.reference_pairs)
    judged_scores = save_scores(folder / JUDGED_SCORES_NAME, judged, served.scores)
    lengths = bucket_lengths(config.serving, config.target, longest)
    LOGGER.info("exporting %s to ONNX", config.checkpoint)
    onnx = export(graph_source(encoder, config, lengths[-1]), folder / "model.onnx")
    difference = parity(encoder, onnx)
    LOGGER.info("ONNX Runtime differs from PyTorch by at most %.2g in fp32", difference)
    return Build(
        config, card, text, onnx, difference, judged, reference, quality, probabilities, live_reference,
        judged_scores, lengths, positions, encoder.inputs, first, cascade,
    )  # fmt: skip


def join_cascade(
    config: Config, judged: JudgedPairs, reference: Reference
) -> tuple[FirstArm | None, dict[str, Any] | None, Reference]:
    """The small arm, what the manifest says of the cascade, and the scores that the arm gives to the judged pairs.

    Without cascade_first these are None, None and the checkpoint's own. Refused if the cascade loses too much.
    """
    if not config.cascade_first:
        return None, None, reference
    first = read_first_arm(config.repository, config.cascade_first, judged)
    cascade = Cascade.fit(config.cascade_k, reference.scores, first.scores)
    scores = cascade.of_lists(first.scores, reference.scores, reference.groups)
    joined = replace(reference, scores=scores, cascade=(cascade, first.scores, reference.scores))
    cost = measure_cost(cascade, reference, joined, config.gate.max_cascade_loss)
    about = {"first": first.name, "first_version": first.version, "first_fingerprint": fingerprint(first.encoder)}
    return first, {**about, "scores": asdict(cascade), "cost": cost.as_json()}, joined


def served_card(card: ScoreCard, max_chunks: int) -> ScoreCard:
    """The checkpoint's card, with no more chunks of a document than are to be served; 0 for as many as it has.

    A map from score to probability that was fitted with more chunks is left out: the build fits one.
    """
    if not 0 < max_chunks < card.chunking.most:
        return card
    return replace(card, chunking=replace(card.chunking, most=max_chunks), calibration=None)


def judge_quality(
    config: Config, judged: JudgedPairs, reference: Reference, first_stage: NDArray[np.float32]
) -> QualityReport:
    """Compare the checkpoint with what ranks today. Refused if it is worse and nobody accepts that."""
    opponents: dict[str, NDArray[np.float32]] = {}
    if config.serves_now != "none":
        arm = config.serves_now or config.name
        opponents = serving_arm(config.repository, arm, judged, reference, first_stage, config.callers_send_prior)
        if config.serves_now and not opponents:
            raise InputError(f"--serves-now {arm}: no version of it serves in {config.repository}")
    name = BM25_NAME if config.first_stage is None else f"first stage {config.first_stage.name}"
    quality = measure_quality(reference, first_stage, name, opponents, config.gate, config.callers_send_prior)
    if quality.objections:
        if not config.accept_worse:
            raise Refused(quality.refusal(config.name))
        LOGGER.warning("--accept-worse (%s): %s", config.accept_worse, "; ".join(quality.objections))
    return quality


def graph_source(encoder: Encoder, config: Config, longest: int) -> Encoder | EngineEncoder:
    """What is exported: for OpenVINO, which fuses it well, transformers' own graph; for TensorRT what `graph` says.

    longest: tokens of the longest pair, padded.
    """
    if config.target == "openvino" or config.serving.graph == "plain":
        return encoder
    family = encoder.model.config.model_type
    if family != "bert":
        raise InputError(
            f"the graph {config.serving.graph!r} is of BERT alone: give --serving.graph plain for {family}"
        )
    if config.serving.graph == "packed":
        return PackedEncoder(encoder.model, longest).eval()
    return PaddedEncoder(encoder.model).eval()


def build_openvino(build: Build, folder: Path) -> int:
    """Build the precisions, gate them from the fastest on, publish the first that passes. Returns the version."""
    config = build.config
    automatic = config.precision == "auto"
    engines = {
        precision: build_cpu_engine(build, folder, precision)
        for precision in (openvino_engine.cpu_precisions() if automatic else [config.precision])
    }
    reports: dict[str, GateReport] = {}
    while waiting := [engine for engine in engines.values() if engine.precision not in reports]:
        best = max(waiting, key=lambda engine: engine.pairs_per_second)
        report = reports[best.precision] = build.gate(best.runner, best.precision)
        if report.passed:
            break  # what is slower need not be judged
        # where fp32 has failed too the export is wrong; beside bf16 the groups' kernels were never measured
        instead = automatic and best.precision == "int8" and "bf16" not in engines and "fp32" not in reports
        if instead and openvino_engine.multiplies_int8() and fitting_groups(build.onnx, build.positions):
            engines["int8_groups"] = build_cpu_engine(build, folder, "int8_groups")
    else:
        if not config.accept_drop:
            by_safety = sorted(reports.values(), key=lambda each: openvino_engine.PRECISIONS.index(each.precision))
            raise Refused(refusal(config.name, by_safety))
        best = max(engines.values(), key=lambda engine: engine.pairs_per_second)
    if config.serving.score_cache_mb:
        served = build.judged.documents.together
        check_kept_scores(build, best.runner, best.precision, served, build.text.pad_id, build.lengths)
        if build.first:
            check_first_arm(build, build.first)
    tried = {
        precision: engine.facts() | ({"gate": reports[precision].as_json()} if precision in reports else {})
        for precision, engine in engines.items()
    }
    return publish_engine(
        config.repository,
        facts(build, best.precision) | {"tried": tried},
        config.checkpoint,
        [best.ir, best.ir.with_suffix(".bin")],
        reports[best.precision],
        openvino_engine.triton_parameters(best.precision, config.serving.threads, config.serving.streams),
        build.judged_scores,
        config.promote,
        build.first,
    )


def build_cpu_engine(build: Build, folder: Path, precision: str) -> CpuEngine:
    """Build an OpenVINO engine in a folder of its own under `folder`, and time it."""
    config, place = build.config, folder / precision
    LOGGER.info("building OpenVINO %s", precision)
    place.mkdir()
    calibration = []
    if precision.startswith("int8"):
        pairs = read_candidates(config.data, build.text, config.calibration_pairs)
        calibration = openvino_engine.calibration_feeds(pairs, build.text.pad_id)

    def judge(path: Path) -> GateReport:
        return build.gate(openvino_engine.runner(path, precision, config.serving.threads), precision)

    known: dict[str, float] = {}
    if precision == "int8_mixed":
        ir, share = build_mixed_ir(build.onnx, place, build.positions, calibration, judge)
        known["int8_share"] = round(share, 3)
    elif precision == "int8_groups":
        ir, known["group"] = build_group_ir(build.onnx, place, build.positions, calibration, judge)
    else:
        ir = openvino_engine.build_ir(build.onnx, place, precision, build.positions, calibration)
    runner = openvino_engine.runner(ir, precision, config.serving.threads)
    speed = openvino_engine.pairs_per_second(runner, build.judged.documents.pairs[:SPEED_PAIRS], build.text.pad_id)
    LOGGER.info("speed: %s %.0f pairs/s", precision, speed)
    return CpuEngine(precision, ir, runner, speed, known)


def check_first_arm(build: Build, first: FirstArm) -> None:
    """The same of a cascade's small engine."""
    precision, text = first.manifest["precision"], StudentFormat.of_checkpoint(first.front)
    table = build.judged.table.to_pydict()
    pairs = text.encode_together(*(table[column][:INVARIANCE_PAIRS] for column in ("query", "title", "summary")))
    runner = openvino_engine.runner(first.encoder / "model.xml", precision, build.config.serving.threads)
    check_kept_scores(build, runner, precision, pairs, text.pad_id, first.manifest["lengths"])


def check_kept_scores(
    build: Build, runner: Runner, precision: str, pairs: EncodedPairs, pad_id: int, lengths: list[int]
) -> None:
    """InputError if a score that the front keeps could differ from the one that it would compute."""
    sample = pairs.take(np.arange(min(len(pairs), INVARIANCE_PAIRS)))
    moved = shapes_that_move_scores(runner, sample, pad_id, build.config.serving, lengths)
    if moved:
        rows, length = moved[0]
        raise InputError(
            f"score_cache_mb: the {precision} engine's scores depend on what else is in a call ({len(moved)} shapes of "
            f"calls move one, first {rows} rows of {length} tokens), so a kept score would not be exact: try another "
            "--precision, or leave the cache out"
        )


def build_tensorrt(build: Build, folder: Path) -> int | None:
    """Cast, gate the cast graph on the CPU, stage, and finish here if TensorRT is installed. Returns the version."""
    config = build.config
    precision = "fp16" if config.precision == "auto" else config.precision
    pairs = read_candidates(config.data, build.text, config.calibration_pairs)
    feeds = openvino_engine.calibration_feeds(pairs, build.text.pad_id)
    packed = config.serving.graph == "packed"
    feeds = [without_padding(feed) if packed else chosen(feed, build.inputs) for feed in feeds]
    graph, kept = tensorrt_engine.make_graph(build.onnx, folder, precision, feeds, config.serving.half_softmax)
    report = build.gate(tensorrt_engine.cast_runner(graph), precision)
    if not report.passed and not config.accept_drop:
        raise Refused(refusal(config.name, [report]))
    known = facts(build, precision) | {"kept_fp32": kept, "cast_gate": report.as_json(), "promote": config.promote}
    folder = config.staging / config.name
    staged = stage(
        folder,
        config.checkpoint,
        graph,
        build.judged.documents,
        build.reference,
        build.judged_scores,
        build.text.pad_id,
        known,
    )
    if tensorrt_engine.is_available():
        return finish(FinishConfig(staged, repository=config.repository))
    LOGGER.warning("the cast graph passed; TensorRT is not installed here. Finish on the GPU machine with:")
    print(container_command(staged, config.repository))
    return None


def facts(build: Build, precision: str) -> dict[str, Any]:
    """What the manifest says of this build besides the gate's figures; plain JSON."""
    config = build.config
    known = {
        "name": config.name,
        "target": config.target,
        "precision": precision,
        "checkpoint": {
            "name": config.checkpoint.resolve().name,
            "fingerprint": fingerprint(config.checkpoint),
            "card": asdict(build.card),
            "chunks": ScoreCard.load(config.checkpoint).chunking.most,  # the version may serve fewer, as its card says
        },
        "onnx": {"fingerprint": fingerprint(build.onnx), "parity_error": build.parity_error},
        "gate_data": {
            "name": config.data.resolve().name,
            "split": config.split,
            "fingerprint": build.judged.fingerprint,
        },
        "gate_limits": asdict(config.gate),
        "accept_drop": config.accept_drop,
        "quality": build.quality.as_json(),
        "probabilities": build.probabilities.as_json(),
        "live_reference": build.live_reference,
        "cascade": build.cascade,
        "accept_worse": config.accept_worse,
        "lengths": build.lengths,
        "inputs": build.inputs,
        "serving": asdict(config.serving),
        "tools": tools(),
    }
    return json.loads(json.dumps(known))


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python build/build_student.py --checkpoint runs/world/student --name student --target openvino "
        "--data data/world",
    )
