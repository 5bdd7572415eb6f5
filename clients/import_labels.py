"""Make a labels folder of scores that exist already: a column in a lake, a TREC run (docs/labelling.md).

    python clients/import_labels.py --candidates data/candidates.parquet --scores scores.parquet --out runs/imported

Scores are joined to the candidates by query_id and doc_id, and what does not join is counted on both sides. Exit code:
0 every candidate has a score; 3 some have none (they are in rejects.parquet); 1 nothing can be imported, and the line
says why.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import astuple, dataclass, field
from pathlib import Path

from clients.labelling.candidate_file import CandidateFile
from clients.labelling.label_folder import LabelFolder, one_writer
from clients.labelling.label_shards import Origin
from clients.labelling.score_files import ScoreColumns, ScoreFile
from clients.labelling.scored_rows import write_scored
from ranking.card import fingerprint
from ranking.errors import InputError
from ranking.program import run

logger = logging.getLogger("labels")

EXIT_REJECTS = 3


@dataclass
class Config:
    """Make a labels folder of existing scores; run it again after an interruption and it goes on.

    Args:
        candidates: candidates.parquet that the scores belong to
        scores: file of scores: .parquet, .jsonl, .csv, .tsv, or a TREC run (.trec, .run)
        out: labels folder to write
        columns: names of the score file's columns
        shard_rows: candidate rows per shard
        least_joined: share of candidates that must have a score; below it nothing is imported
    """

    candidates: Path
    scores: Path
    out: Path
    columns: ScoreColumns = field(default_factory=ScoreColumns)
    shard_rows: int = 10_000
    least_joined: float = 0.5

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows is {self.shard_rows}: at least 1 is needed")
        if not 0 <= self.least_joined <= 1:
            raise ValueError(f"least_joined is {self.least_joined}: a share between 0 and 1 is meant")


def main(config: Config) -> int:
    """Join, check, write. Returns the exit code."""
    candidates = CandidateFile.open(config.candidates)
    with one_writer(config.out), ScoreFile(config.scores, config.columns, candidates, config.out) as scores:
        counts = scores.counts()
        logger.info("%s: %s", config.scores, counts)
        if counts.joined < config.least_joined * counts.candidates or not counts.joined:
            raise InputError(
                f"{config.scores}: {counts}; --least-joined asks for {config.least_joined:.0%}: wrong file or ids?"
            )
        origin = Origin.of(candidates, config.shard_rows, teacher_id(config.scores, config.columns))
        folder = LabelFolder(config.out, candidates, origin)
        rejects = write_scored(folder, scores.scores(), f"no score in {config.scores.name}")["counts"]["rejects"]
    logger.info("%s: %d labels, %d rejects", config.out, counts.candidates - rejects, rejects)
    return EXIT_REJECTS if rejects else 0


def teacher_id(scores: Path, columns: ScoreColumns) -> str:
    """16 hex digits of the score file's bytes and the columns that were read."""
    known = "\n".join((fingerprint(scores), *astuple(columns)))
    return hashlib.sha256(known.encode()).hexdigest()[:16]


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python clients/import_labels.py --candidates data/world/candidates.parquet --scores scores.parquet "
        "--out runs/imported",
    )
