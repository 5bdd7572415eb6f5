"""What pre-training on clicks is worth: the teacher with it, without it, and BM25, over several seeds.

    python -m benchmarks.teacher.pretraining_gain --data data/world --runs runs/pretraining_gain

Each seed pre-trains the same small decoder twice, with equal steps: on clicked pairs, and on the same documents with
words of their own for a query, so that it knows the language but nothing of the searchers. Stage 2 is the same for
both: the decoder's own likelihood becomes its score, then judgments train it. (From random weights a decoder this small
learns nothing from a few hundred judged queries: benchmarks/students/ablation.py, teacher-random.)
Every finished stage is kept, with the settings that made it: run again to continue. The figures are NDCG@5 (linear
gain) of the test queries; intervals resample training seeds and queries.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ranking.bm25 import bm25_scores
from ranking.card import CARD_NAME, ScoreCard
from ranking.errors import InputError
from ranking.files import replacing
from ranking.metrics import JudgedRanking
from ranking.program import run
from ranking.schema import read_table
from ranking.significance import Interval, paired_bootstrap, randomisation_test, seeds_bootstrap
from ranking.text import TeacherFormat
from training.evaluation.checkpoint_scores import score_pairs
from training.teacher.decoder import open_decoder
from training.teacher.likelihood import evidence

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
SECONDS, SETTINGS = "seconds.txt", "settings.txt"


@dataclass
class Config:
    """Measure what continued pre-training adds to the teacher.

    Args:
        data: dataset folder with clicks and judgments
        runs: folder for checkpoints and scores; finished parts are not trained again
        seeds: training seeds
        pretrain_config: YAML of stage 1
        likelihood_config: YAML of stage 2's start from the likelihood; null to train on judgments at once
        finetune_config: YAML of stage 2
        pretrain_flags: further flags of stage 1, e.g. click_share=0.05 for a quick look
        finetune_flags: further flags of stage 2, for both teachers
        one_pretraining: pre-train with the first seed only and vary the seed of stage 2 alone, where time is short
        out: results page; empty for none
        note: a line on the machine and the date for the page
    """

    data: Path
    runs: Path
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    pretrain_config: Path = Path("training/configs/pretrain_small.yaml")
    likelihood_config: Path | None = Path("training/configs/likelihood_small.yaml")
    finetune_config: Path = Path("training/configs/finetune_small.yaml")
    pretrain_flags: list[str] = field(default_factory=list)
    finetune_flags: list[str] = field(default_factory=list)
    one_pretraining: bool = False
    out: str = "docs/results/pretraining_gain.md"
    note: str = ""

    def __post_init__(self):
        if not self.seeds:
            raise ValueError("seeds: at least one is needed")


@dataclass
class Row:
    """One system: NDCG@5 float [seeds, queries], PNR and training seconds per seed; BM25 has one "seed"."""

    name: str
    ndcg: NDArray[np.float64]
    pnr: list[float]
    seconds: list[float]


def main(config: Config) -> None:
    """Train what is not there yet, judge every system on the test queries, write the results page."""
    test = read_table(config.data / "judgments" / "test.parquet", "judgments")
    query, title, summary = (test.column(name).to_pylist() for name in ("query", "title", "summary"))
    grades = test.column("grade").to_numpy()
    _, groups = np.unique(test.column("query_id").to_pylist(), return_inverse=True)

    def judge(name: str, scores: Sequence[NDArray], seconds: list[float]) -> Row:
        judged = [JudgedRanking(s, grades, groups) for s in scores]
        ndcg = np.stack([j.ndcg(5) for j in judged])
        return Row(name, ndcg, [j.pairs().pnr for j in judged], seconds)

    rows = [judge("BM25", [bm25_scores(query, title, summary)], [])]
    starts, likelihoods, perplexities = [], [], []
    for name, queries in {"documents alone": "document", "clicks": "clicked"}.items():
        made: dict[str, list] = {"likelihood": [], "start": [], "teacher": []}
        for seed in config.seeds:
            first = config.seeds[0] if config.one_pretraining else seed
            model = config.runs / f"pretrained-{queries}-{first}"
            words = ["--queries", queries, *flag_words(config.pretrain_flags)]
            spent = train("pretrain_teacher", model, [*common(config, config.pretrain_config, first), *words])
            perplexities.append(ScoreCard.load(model).metrics["perplexity"])
            made["likelihood"].append((kept_evidence(model, query, title, summary), spent))
            for stage, settings, flags in (
                ("start", config.likelihood_config, []),
                ("teacher", config.finetune_config, flag_words(config.finetune_flags)),
            ):
                if settings is None:
                    continue
                out = config.runs / f"{stage}-{queries}-{seed}"
                spent += train("finetune_teacher", out, [*common(config, settings, seed), "--model", model, *flags])
                made[stage].append((kept_scores(out, query, title, summary), spent))
                model = out
        rows.append(judge(f"teacher pre-trained on {name}", *map(list, zip(*made["teacher"]))))
        if made["start"]:
            starts.append(judge(f"its start from {name}, no judged train query yet", *map(list, zip(*made["start"]))))
        likelihoods.append(judge(f"the decoder's own likelihood, {name}", *map(list, zip(*made["likelihood"]))))
    rows += [*starts, *likelihoods]
    page = results_page(config, rows, perplexities)
    print(page)
    if config.out:
        with replacing(config.out) as aside:
            aside.write_text(page, encoding="utf-8")


def common(config: Config, settings: Path, seed: int) -> list[object]:
    """The words of the command line that all stages share."""
    return ["--config", settings, "--data", config.data, "--seed", seed]


def flag_words(flags: list[str]) -> list[str]:
    """`name=value` settings as flags."""
    return [f"--{flag}" for flag in flags]


def train(program: str, out: Path, words: Sequence[object]) -> float:
    """Run a training program unless its checkpoint is whole already, made by the same settings.

    Returns the seconds it took then or now.
    """
    known, settings = out / SECONDS, out / SETTINGS
    wanted = settings_text(program, words)
    whole = (out / CARD_NAME).is_file() and known.is_file()
    if not (whole and settings.is_file() and settings.read_text(encoding="utf-8") == wanted):
        if out.exists():
            shutil.rmtree(out)  # a part of a run, whose time would mean nothing, or another recipe
        LOGGER.info("training %s", out.name)
        start = time.perf_counter()
        command = [sys.executable, "-m", f"training.{program}", *map(str, words), "--out", str(out)]
        finished = subprocess.run(command, cwd=ROOT, env=os.environ, check=False)
        if finished.returncode:
            raise InputError(f"{' '.join(command[1:])}: ended with code {finished.returncode}; see its message above")
        known.write_text(f"{time.perf_counter() - start:.1f}\n", encoding="utf-8")
        settings.write_text(wanted, encoding="utf-8")
        shutil.rmtree(out / "training", ignore_errors=True)  # optimiser states of a finished run
    return float(known.read_text(encoding="utf-8"))


def settings_text(program: str, words: Sequence[object]) -> str:
    """The command, the YAML files that it names, and the settings of the checkpoint that it starts from."""
    files = [ROOT / str(word) for word in words if str(word).endswith(".yaml")]
    files += [ROOT / str(word) / SETTINGS for word in words if (ROOT / str(word) / SETTINGS).is_file()]
    return "\n".join([shlex.join([program, *map(str, words)]), *(path.read_text(encoding="utf-8") for path in files)])


def kept_scores(teacher: Path, query: list[str], title: list[str], summary: list[str]) -> NDArray:
    """A teacher's scores of the test pairs, float32 [n], computed once and kept beside its checkpoint."""
    return kept(teacher, lambda: score_pairs(teacher, query, title, summary, progress=f"score {teacher.name}"))


def kept_evidence(pretrained: Path, query: list[str], title: list[str], summary: list[str]) -> NDArray:
    """How much likelier the query makes each document, by the decoder of stage 1: float32 [n], in nats."""

    def find() -> NDArray:
        text_format, decoder = TeacherFormat.of_checkpoint(pretrained), open_decoder(pretrained)
        return evidence(decoder, text_format, decoder.config.pad_token_id, query, title, summary)[1]

    return kept(pretrained, find)


def kept(checkpoint: Path, find: Callable[[], NDArray]) -> NDArray:
    """What `find` gives, float32 [n], computed once and kept beside the checkpoint."""
    path = checkpoint / "test_scores.npy"
    if not path.is_file():
        scores = find()
        with replacing(path) as aside, aside.open("wb") as stream:
            np.save(stream, scores)
    return np.load(path)


def results_page(config: Config, rows: list[Row], perplexities: list[float]) -> str:
    """The results page: a table of systems, a table of differences, and the command."""
    bm25, without, with_ = rows[:3]
    lines = [
        "# What pre-training on clicks is worth",
        "",
        f"Test queries of {config.data.name}, NDCG@5 with linear gain, {len(config.seeds)} training seeds. Both "
        "teachers have the same architecture, vocabulary size, number of pre-training steps and stage-2 recipe; the "
        "one without clicks was pre-trained on the same documents with words of their own in place of the query."
        + (" The seeds are stage 2's; stage 1 ran once for each." if config.one_pretraining else ""),
        "",
        "| system | NDCG@5 (mean over seeds) | per seed | PNR | training seconds per seed |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        seeds = ", ".join(f"{value:.4f}" for value in row.ndcg.mean(1))
        seconds = ", ".join(f"{value:.0f}" for value in row.seconds) or "none"
        lines.append(f"| {row.name} | {np.mean(row.ndcg):.4f} | {seeds} | {np.mean(row.pnr):.2f} | {seconds} |")
    lines += [
        "",
        "| difference in NDCG@5 | per seed | mean | 95%, seeds and queries drawn anew | 95%, these models | "
        "p, these models |",
        "|---|---|---|---|---|---|",
    ]
    for better, worse in ((with_, without), (with_, bm25), (without, bm25)):
        difference = better.ndcg - worse.ndcg  # BM25's one row against each seed
        over_queries = paired_bootstrap(better.ndcg.mean(0), worse.ndcg.mean(0))
        cells = [
            f"{better.name} - {worse.name}",
            ", ".join(f"{value:+.3f}" for value in difference.mean(1)),
            f"{over_queries.value:+.4f}",
            span(seeds_bootstrap(difference)) if len(difference) > 1 else "one seed",
            span(over_queries),
            f"{randomisation_test(better.ndcg.mean(0), worse.ndcg.mean(0)):.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Held-out perplexity after stage 1, documents alone then clicks, per seed: "
        + ", ".join(f"{value:.2f}" for value in perplexities)
        + ".",
        "",
        f"Command: `python -m benchmarks.teacher.pretraining_gain --data {config.data} --runs {config.runs}"
        + "".join(f" --pretrain-flags {flag}" for flag in config.pretrain_flags)
        + "".join(f" --finetune-flags {flag}" for flag in config.finetune_flags)
        + "".join(
            f" --{name.replace('_', '-')} {value}"
            for name in ("pretrain_config", "likelihood_config", "finetune_config")
            if (value := getattr(config, name)) != Config.__dataclass_fields__[name].default
        )
        + ("" if config.seeds == [1, 2, 3] else f" --seeds '{config.seeds}'")
        + (" --one-pretraining" if config.one_pretraining else "")
        + "`",
        *(["", config.note] if config.note else []),
        "",
    ]
    return "\n".join(lines)


def span(found: Interval) -> str:
    """The interval as `low to high`."""
    return f"{found.low:+.4f} to {found.high:+.4f}"


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m benchmarks.teacher.pretraining_gain --data data/world --runs runs/pretraining_gain",
    )
