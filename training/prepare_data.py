"""Writes a dataset folder (docs/data.md) from a judged collection, a table of judgments, or the built-in world."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

from ranking.errors import DataError, InputError
from ranking.files import replacing
from ranking.program import run
from ranking.schema import OnBadRow, Rejects
from training.sources.dataset_folder import DatasetSettings, write_dataset
from training.sources.download import fetch_msrd
from training.sources.grade_scales import map_grades, parse_grades, word_grades
from training.sources.judged_collections import (
    MSRD_FILES,
    JudgedSource,
    read_beir,
    read_dataset,
    read_ir_dataset,
    read_msrd,
)
from training.sources.judgment_table import parse_columns, read_table_source
from training.sources.old_clicks import clicks_are_judgments, warn_of_old_log
from training.sources.row_readers import BadRows
from training.world.dataset import WorldConfig, write_world

LOGGER = logging.getLogger(__name__)
SOURCES = "beir:PATH, msrd, msrd:PATH, ir:DATASET_ID, table:PATH, dataset:PATH, world"


@dataclass(kw_only=True)
class Config(DatasetSettings):
    """Write a dataset folder: judgments/{train,dev,test}.parquet, candidates.parquet and dataset.json.

    Args:
        source: beir:PATH, msrd (downloads), msrd:PATH, ir:DATASET_ID, table:PATH, dataset:PATH (a prepared one) or
            world
        out: dataset folder to write
        columns: for table: OURS=THEIRS for query, title, grade, query_id, doc_id, summary, split
        grades: how the source's grades become ours, 0 to 4: THEIRS=OURS, as in 1,1.33=0,1.67,2=1,3=2, or by-rank;
            without it whole grades from 0 to 4 stay, negative ones are 0, and another scale is mapped by rank; a
            table whose grades are words needs it, as in Irrelevant=0,Partial=1,Exact=2
        on_bad_row: stop at the first bad row, or reject: write it to rejects.tsv and go on
        licence: what dataset.json states, where the source does not say
        downloads: where downloaded files are kept
        world: sizes and seed of the built-in world, e.g. --world.documents 2000; it takes no other setting
    """

    source: str
    out: Path
    columns: list[str] = field(default_factory=list)
    grades: list[str] = field(default_factory=list)
    on_bad_row: OnBadRow = "stop"
    licence: str = ""
    downloads: Path = Path("data/downloads")
    world: WorldConfig = field(default_factory=WorldConfig)

    def __post_init__(self):
        super().__post_init__()
        parse_grades(self.grades)
        if self.source != "world" and self.world != WorldConfig():
            raise ValueError(f"world: sizes of the built-in world, and source is {self.source}")
        for setting in fields(self) if self.source == "world" else ():
            default = setting.default if setting.default_factory is MISSING else setting.default_factory()
            if setting.name not in ("source", "out", "downloads", "world") and getattr(self, setting.name) != default:
                raise ValueError(f"{setting.name}: of other sources; the built-in world has --world.seed and its sizes")


def main(config: Config) -> None:
    """Read the source, check that something can be learned from it, and write the dataset folder."""
    if config.source == "world":
        write_world(config.world, config.out)
        return
    rejects = config.out / "rejects.tsv"
    rejects.unlink(missing_ok=True)
    keep = Rejects(rejects) if config.on_bad_row == "reject" else None
    bad = BadRows(keep, remedy="--on-bad-row reject goes on without such rows")
    source = read_source(config, bad)
    mapped = map_grades(source, config.grades, bad)
    check_usable(source, config.source, config.negatives, bad)
    if config.source.startswith("dataset:"):
        given = Path(config.source.removeprefix("dataset:"))
        of_judgments = clicks_are_judgments(given)
        if of_judgments and config.simulate_clicks == "none":
            # copied, they would hold the grades that this draw takes away, and train queries that are test queries now
            config = replace(config, clicks_from_judgments=True)
        _copy_clicks(given, config.out, ["events.parquet"] if of_judgments else ["clicks.parquet", "events.parquet"])
    if not _renews(config, "clicks.parquet") and clicks_are_judgments(config.out):
        clicks = config.out / "clicks.parquet"
        clicks.unlink()
        LOGGER.warning("%s is deleted: it was made from the judgments that were here before", clicks)
    for name in ("clicks.parquet", "events.parquet"):
        if not _renews(config, name):
            warn_of_old_log(config.out / name, config.source)
    content = write_dataset(
        source,
        config,
        config.out,
        origin=config.source,
        licence=config.licence,
        rejected=bad.count,
        reading={
            "columns": config.columns,
            "grades": mapped or word_grades(config.grades),
            "on_bad_row": config.on_bad_row,
        },
    )
    if bad.count:
        LOGGER.warning("%d bad rows were left out; see %s", bad.count, rejects)
    LOGGER.info("%s: %s", config.out, content["counts"])


def _renews(config: Config, name: str) -> bool:
    """Whether this run writes or removes clicks.parquet, or events.parquet, itself."""
    kind, _, where = config.source.partition(":")
    copied = kind == "dataset" and (Path(where) / name).is_file()
    return copied or config.simulate_clicks != "none" or (name == "clicks.parquet" and config.clicks_from_judgments)


def _copy_clicks(source: Path, out: Path, names: Sequence[str]) -> None:
    """The click pairs and the raw log of a prepared dataset, as they are."""
    for name in names:
        if (source / name).is_file():
            with replacing(out / name) as aside:
                shutil.copyfile(source / name, aside)


def read_source(config: Config, bad: BadRows) -> JudgedSource:
    """The judged documents and queries of config.source. InputError if it is none of SOURCES."""
    kind, _, where = config.source.partition(":")
    spare: int | None = config.corpus_limit or None
    if not (config.candidate_documents or config.negatives or config.title_queries):
        spare = 0
    if kind == "beir" and where:
        return read_beir(Path(where), bad, spare)
    if kind == "msrd":
        return read_msrd(Path(where) if where else fetch_msrd(config.downloads / "msrd", MSRD_FILES), bad, spare)
    if kind == "ir" and where:
        return read_ir_dataset(where, bad, spare)
    if kind == "table" and where:
        return read_table_source(Path(where), parse_columns(config.columns), bad, word_grades(config.grades))
    if kind == "dataset" and where:
        if config.out.resolve() in (Path(where).resolve(), (Path(where) / "judgments").resolve()):
            raise InputError(f"--out {config.out}: is the source itself")
        return read_dataset(Path(where), bad)
    raise InputError(f"--source {config.source}: one of {SOURCES} is expected")


def check_usable(source: JudgedSource, origin: str, negatives: int, bad: BadRows) -> None:
    """DataError unless some query has two documents of different grade: nothing could be trained or measured."""
    if not any(source.judged.values()):
        refused = f"; {bad.count} rows were refused, the first one: {bad.first}" if bad.count else ""
        raise DataError(origin, f"no usable query: not one judged pair is left{refused}")
    for grades in source.judged.values():
        first: dict[str, float] = {}
        for (query_id, _), grade in grades.items():
            if first.setdefault(query_id, grade) != grade or (negatives and grade):
                return
    raise DataError(
        origin,
        "no usable query: none has documents of different grades; where only relevant pairs are judged, "
        "--negatives 20 adds documents found by BM25 as grade 0",
    )


if __name__ == "__main__":
    run(main, Config, example="python -m training.prepare_data --source beir:path/to/set --out data/set")
