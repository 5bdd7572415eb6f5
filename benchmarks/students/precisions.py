"""What INT8 costs and brings on a CPU: tau with fp32, NDCG@5 and processor time a page, of one student or several.

python -m benchmarks.students.precisions --data runs/demo-data/data --students student=runs/demo-data/student

Each student is built in fp32, in bf16 where the CPU computes in it, in INT8 by NNCF and in INT8 in groups, calibrated
as build/build_student.py does. Every engine then ranks the same test queries' judged documents, which neither
calibration nor gate has seen, in process and with the front's own code; times are of rounds that take turns.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.paired_rounds import interleaved, ratio_of_medians, timed
from benchmarks.serving.cascade import Encoder, JudgedList, read_lists, score_pages
from benchmarks.students.runs import paired_gain
from build import group_quantisation, openvino_engine
from build.export_onnx import export, load_encoder, widen_positions
from build.judged_pairs import read_candidates
from build.triton_config import ServingLimits
from ranking.encoder_inputs import Feed
from ranking.metrics import JudgedRanking, kendall_tau
from ranking.program import run
from ranking.text import StudentFormat

EXACT = "fp32"


@dataclass
class Config:
    """Build the engines, rank the test queries with each, and print the table.

    Args:
        data: dataset folder with test judgments and candidates
        students: NAME=CHECKPOINT of each student
        queries: test queries that are ranked at most
        pages: of these, those that are timed
        rounds: rounds of the timing
        threads: of each engine; 0: all cores
        calibration_pairs: candidates that INT8 is calibrated on
    """

    data: Path
    students: list[str]
    queries: int = 400
    pages: int = 20
    rounds: int = 5
    threads: int = 1
    calibration_pairs: int = 256

    def __post_init__(self) -> None:
        for student in self.students:
            if not all(student.partition("=")):
                raise ValueError(f"students: {student!r} is not NAME=CHECKPOINT")


def main(config: Config) -> None:
    """Print one table with all students."""
    lists = read_lists(config.data, config.queries)
    lines = [
        f"{len(lists)} test queries, {sum(len(each.grades) for each in lists)} judged documents",
        "",
        "| student | precision | tau with fp32 | mean error, largest | NDCG@5 | less fp32's | p "
        "| ms of processor time a page | pages per processor second |",
        "|---|---|--:|---|--:|---|--:|--:|---|",
    ]
    for student in config.students:
        name, _, checkpoint = student.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            lines += measure(config, name, Path(checkpoint), Path(folder), lists)
    print("\n".join(lines))


def measure(config: Config, name: str, checkpoint: Path, folder: Path, lists: Sequence[JudgedList]) -> list[str]:
    """The rows of one student."""
    encoders = build_encoders(config, checkpoint, folder)
    scored = {
        precision: np.concatenate([encoder.scores(page, np.arange(len(page.grades))) for page in lists])
        for precision, encoder in encoders.items()
    }
    pages = lists[: config.pages]
    ways = {precision: partial(timed, partial(score_pages, encoder, pages)) for precision, encoder in encoders.items()}
    for way in ways.values():
        way()  # the first pages of an engine compile their shapes
    spent = {
        precision: [1e3 * each.processor_seconds / len(pages) for each in rounds]
        for precision, rounds in interleaved(ways, config.rounds, name).items()
    }
    groups = np.repeat(np.arange(len(lists)), [len(page.grades) for page in lists])
    grades = np.concatenate([page.grades for page in lists])

    def ndcg(scores: NDArray[np.float32]) -> NDArray[np.float64]:
        return JudgedRanking(scores, grades, groups, len(lists)).ndcg(5)

    exact, rows = scored[EXACT], []
    for precision, scores in scored.items():
        cells = [name, precision]
        gain = f"{ratio_of_medians(spent[EXACT], spent[precision])} x"
        quality, time = f"{ndcg(scores).mean():.4f}", f"{statistics.median(spent[precision]):.1f}"
        if precision == EXACT:
            cells += ["", "", quality, "", "", time, "1"]
        else:
            error = np.abs(scores - exact) / exact.std()
            tau = float(np.nan_to_num(kendall_tau(scores, exact, groups), nan=1.0).mean())  # as the gate counts it
            cells += [f"{tau:.4f}", f"{error.mean():.4f}, {error.max():.3f}", quality]
            cells += [*paired_gain((ndcg(scores) - ndcg(exact))[None]), time, gain]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def build_encoders(config: Config, checkpoint: Path, folder: Path) -> dict[str, Encoder]:
    """Precision -> the student's engine."""
    text = StudentFormat.of_checkpoint(checkpoint)
    candidates = read_candidates(config.data, text, config.calibration_pairs)
    feeds = openvino_engine.calibration_feeds(candidates, text.pad_id)
    ways: dict[str, tuple[str, Callable[..., Path]]] = {
        precision: (precision, partial(openvino_engine.build_ir, calibration=feeds))
        for precision in reversed(openvino_engine.cpu_precisions())
    }
    for group in groups_of(checkpoint, folder):
        ways[f"int8_groups of {group}"] = "int8_groups", partial(in_groups, feeds, group)
    return {
        name: Encoder(checkpoint, folder / name, precision, config.threads, ServingLimits(), build)
        for name, (precision, build) in ways.items()
    }


def groups_of(checkpoint: Path, folder: Path) -> list[int]:
    """The groups that fit the student."""
    encoder = load_encoder(checkpoint)
    positions = widen_positions(encoder)
    return group_quantisation.fitting_groups(export(encoder, folder / "widths.onnx"), positions)


def in_groups(feeds: Sequence[Feed], group: int, onnx: Path, folder: Path, precision: str, positions: int) -> Path:
    """INT8 in groups of this size, whether or not a gate would let it pass."""
    seen = group_quantisation.activations(onnx, positions, feeds)
    return group_quantisation.write_group_ir(onnx, folder, positions, seen, group)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m benchmarks.students.precisions --data runs/demo-data/data "
        "--students student=runs/demo-data/student",
    )
