"""Put a built student into a Triton model repository: two numbered folders, written aside and renamed into place.

    <repository>/<name>/config.pbtxt                    which version serves (build/releases.py changes it)
    <repository>/<name>/3/                              model.py and its modules, ranking/, tokenizer.json,
                                                        ranker.json, manifest.json, judged_scores.npz,
                                                        probabilities.json, reference.json,
                                                        config.pbtxt as this version wants it
    <repository>/<name>_encoder/3/                      model.xml + model.bin | model.plan, manifest.json, config.pbtxt
    <repository>/<name>_first_encoder/3/                the same of a cascade's small model

A numbered folder is never written again. Triton ignores folders whose names are no numbers, so the new version is
gathered in one beside the others, on the same file system.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2 as pb

from build.cascade import FirstArm
from build.gate import GateReport
from build.probabilities import ProbabilityMaps
from build.quality_gate import JUDGED_SCORES_NAME
from build.reference_scores import REFERENCE_NAME
from build.releases import MANIFEST_NAME, encoder_homes, numbers, one_change, promote
from build.triton_config import (
    CONFIG_NAME,
    ServingLimits,
    as_text,
    encoder_config,
    encoder_name,
    first_encoder_name,
    front_config,
    read_config,
)
from ranking.card import CARD_NAME, ScoreCard, fingerprint
from ranking.cascade import Cascade
from ranking.errors import InputError
from ranking.files import new_folder, write_json
from ranking.prior import PriorBlend

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]
FRONT_SOURCES = tuple(
    f"serving/front/{name}.py"
    for name in (
        "model", "pages", "request_fields", "served_encoder", "buckets", "field_cache", "score_cache", "cache_metrics"
    )
)  # fmt: skip
# ranking/text.py, encoder_inputs.py, prior.py, cascade.py, calibration.py, tracing.py and all that they import of ours
FRONT_MODULES = tuple(
    f"ranking/{name}.py"
    for name in (
        "__init__", "errors", "files", "limits", "visible", "chunks", "card", "text", "encoder_inputs", "prior",
        "cascade", "calibration", "tracing",
    )
)  # fmt: skip
PROBABILITIES_NAME = "probabilities.json"
FIRST_FOLDER = "first"  # of a cascade's version: tokenizer and card of its small model


def publish(
    repository: str | Path,
    name: str,
    tokenizer: Path,
    card: ScoreCard,
    engine_files: Sequence[Path],
    front: pb.ModelConfig,
    encoder: pb.ModelConfig,
    manifest: Mapping[str, Any],
    judged_scores: Path,
    beside: Mapping[str, Any],
    first: FirstArm | None = None,
) -> int:
    """Write the next version of both models and return its number. The front comes last: it makes the version exist.

    tokenizer: the checkpoint's; card: what the version serves; beside: further JSON files of the front's version
    folder, by name; first: the small arm of a cascade, whose engine becomes a third model.
    """
    first_home = Path(repository) / first_encoder_name(name)
    homes = [first_home, Path(repository) / encoder_name(name), Path(repository) / name]

    def fill_encoder(folder: Path) -> None:
        for path in engine_files:
            shutil.copy2(path, folder / path.name)

    def fill_front(folder: Path) -> None:
        for source in FRONT_SOURCES:
            shutil.copy2(ROOT / source, folder / Path(source).name)
        (folder / "ranking").mkdir()
        for source in FRONT_MODULES:
            shutil.copy2(ROOT / source, folder / source)
        shutil.copy2(tokenizer, folder / "tokenizer.json")
        card.save(folder)
        shutil.copy2(judged_scores, folder / JUDGED_SCORES_NAME)
        for file, content in beside.items():
            write_json(folder / file, content)

        if first:
            (folder / FIRST_FOLDER).mkdir()
            for file in ("tokenizer.json", CARD_NAME):
                shutil.copy2(first.front / file, folder / FIRST_FOLDER / file)

    def fill_first(folder: Path) -> None:
        for path in first.engine_files if first else ():
            shutil.copy2(path, folder / path.name)

    Path(repository).mkdir(parents=True, exist_ok=True)
    with one_change(Path(repository)):
        version = max((number for home in homes for number in numbers(home)), default=0) + 1
        record = {
            "name": name,
            "version": version,
            "published": datetime.now(UTC).isoformat(timespec="seconds"),
            **manifest,
        }
        if first:
            config = read_config(first.encoder / CONFIG_NAME)
            config.name = first_home.name
            config.metric_tags.clear()
            config.metric_tags.update({**encoder.metric_tags, "precision": first.manifest["precision"]})
            _add_version(first_home, version, config, record, fill_first)
        for home, config, fill in zip(homes[1:], (encoder, front), (fill_encoder, fill_front)):
            _add_version(home, version, config, record, fill)
    return version


def publish_engine(
    repository: str | Path,
    facts: Mapping[str, Any],
    checkpoint: str | Path,
    engine_files: Sequence[Path],
    report: GateReport,
    parameters: Mapping[str, str],
    judged_scores: Path,
    promote_it: bool,
    first: FirstArm | None = None,
) -> int:
    """Publish a gated engine with its configs and manifest, and promote it unless told not to. Returns the version.

    facts: what build_student.py knows of the build; checkpoint: folder with tokenizer.json; parameters: those of the
    encoder's Triton backend; judged_scores: what build/quality_gate.py saved, for later comparisons; first: the small
    arm, where facts["cascade"] makes the arm a cascade.
    """
    name, target, lengths = facts["name"], facts["target"], facts["lengths"]
    limits = ServingLimits(**facts["serving"])
    card = ScoreCard.from_json(json.dumps(facts["checkpoint"]["card"]), f"the card of {name}")
    identity = facts["checkpoint"]["fingerprint"]
    # with fewer chunks it is another ranker to whoever keeps its scores
    if card.chunking.most < facts["checkpoint"]["chunks"]:
        identity += f"-{card.chunking.most}-chunks"
    tags = {"arm": name, "role": card.role, "precision": facts["precision"], "checkpoint": identity}
    maps = ProbabilityMaps(**facts["probabilities"])
    cascade = Cascade(**facts["cascade"]["scores"]) if facts.get("cascade") else None
    first_lengths = first.manifest["lengths"] if first else ()
    manifest = {
        **{k: v for k, v in facts.items() if k not in ("queries", "pad_id", "name", "live_reference", "promote")},
        "probabilities": maps.described(report.ece if cascade is None else facts["cascade"]["ece"]),
        "gate": report.as_json(),
        "accepted_drop": report.objections,
        "built_with": tools(),
    }
    prior = PriorBlend(**facts["quality"]["prior"])
    chunks = card.chunking.most
    front = front_config(
        name, target, limits, lengths, tags, prior, maps.served is not None, cascade, first_lengths, chunks
    )
    encoder = encoder_config(name, target, limits, lengths, tags, parameters, facts["inputs"], chunks)
    beside = {REFERENCE_NAME: facts["live_reference"]}
    if maps.served:
        beside[PROBABILITIES_NAME] = maps.served
    version = publish(
        repository,
        name,
        Path(checkpoint) / "tokenizer.json",
        card,
        engine_files,
        front,
        encoder,
        manifest,
        judged_scores,
        beside,
        first,
    )
    LOGGER.info("published %s version %d (%s %s)", name, version, target, facts["precision"])
    if report.objections:
        LOGGER.warning("--accept-drop: published although %s", "; ".join(report.objections))
    if promote_it:
        promote(repository, name, version)
    elif waiting := [home.name for home in (*encoder_homes(Path(repository), name, version), Path(repository) / name)
                     if not (home / CONFIG_NAME).is_file()]:  # fmt: skip
        LOGGER.warning(
            "%s: no version of it was ever promoted, and a tritonserver that loads whatever lies in %s does not start "
            "with such a folder: promote it first, or start with --model-control-mode=explicit --load-model=...",
            ", ".join(waiting), repository,
        )  # fmt: skip
    return version


def refusal(name: str, reports: Sequence[GateReport]) -> str:
    """Why nothing was published, in one line: each precision's objections, and what to do about the last one."""
    reasons = "; ".join(f"{report.precision}: {', '.join(report.objections)}" for report in reports)
    return f"{name} is not published: {reasons}; {reports[-1].advice()}"


def tools() -> dict[str, str]:
    """Versions of what makes an engine, and the machine's kind."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt", "polygraphy"):
        with suppress(metadata.PackageNotFoundError):  # a machine that only finishes an engine lacks most of them
            found[package] = metadata.version(package)
    return found


def _add_version(
    home: Path, version: int, config: pb.ModelConfig, record: Mapping[str, Any], fill: Callable[[Path], None]
) -> None:
    home.mkdir(parents=True, exist_ok=True)
    try:
        with new_folder(home / str(version)) as aside:
            fill(aside)
            (aside / CONFIG_NAME).write_text(as_text(config), encoding="utf-8")
            files = {str(f.relative_to(aside)): fingerprint(f) for f in sorted(aside.rglob("*")) if f.is_file()}
            write_json(aside / MANIFEST_NAME, {**record, "files": files})
    except OSError as problem:
        raise InputError(f"{home}/{version}: cannot be published: {problem}") from problem
