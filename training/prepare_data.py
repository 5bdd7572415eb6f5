"""Write a dataset folder (docs/data.md) from a BEIR folder, MSRD, ir_datasets, a table of judgements, or the built-in world."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ranking.card import fingerprint
from ranking.errors import DataError, InputError
from ranking.files import replacing, write_json
from ranking.program import run
from ranking.schema import MAX_GRADE, OnBadRow, Rejects, read_table, write_table
from training.sources.dataset_tables import add_negatives, clicks_from_judgments, pair_table
from training.sources.download import fetch_msrd
from training.sources.judged_collections import (
    MSRD_FILES,
    JudgedSource,
    read_beir,
    read_dataset,
    read_ir_dataset,
    read_msrd,
)
from training.sources.query_splits import SPLITS, QuerySplits, assign_splits, shuffled
from training.sources.source_rows import BadRows
from training.sources.table_source import parse_columns, read_table_source
from training.world.dataset import WorldConfig, write_world

LOGGER = logging.getLogger(__name__)
SOURCES = "beir:PATH, msrd, msrd:PATH, ir:DATASET_ID, table:PATH, dataset:PATH, world"


@dataclass
class Config:
    """Write a dataset folder: judgments/{train,dev,test}.parquet, candidates.parquet and dataset.json.

    Args:
        source: beir:PATH, msrd (downloads), msrd:PATH, ir:DATASET_ID, table:PATH, dataset:PATH (a prepared one) or world
        out: dataset folder to write
        columns: for table: OURS=THEIRS for query, title, grade, query_id, doc_id, summary, split
        dev_fraction: share of the train queries that become dev where the source has none
        test_fraction: share of the queries that become test where the source has none
        judged_fraction: share of the train queries that keep their grades; the others' documents become candidates
        train_queries: at most this many judged train queries, of those that keep their grades; 0 for all
        dev_queries: at most this many dev queries; 0 for all
        test_queries: at most this many test queries; 0 for all
        unlabelled_queries: at most this many queries in candidates.parquet; 0 for all
        negatives: BM25's best unjudged documents added to each query as grade 0; for sets where only relevant ones are judged
        clicks_from_judgments: write clicks.parquet from the relevant train pairs, for continued pre-training without a log
        on_bad_row: stop at the first bad row, or reject: write it to rejects.tsv and go on
        licence: what dataset.json states, where the source does not say
        seed: draws splits and samples; another seed, another draw
        downloads: where downloaded files are kept
        world: sizes of the built-in world, e.g. --world.documents 2000
    """

    source: str
    out: Path
    columns: list[str] = field(default_factory=list)
    dev_fraction: float = 0.1
    test_fraction: float = 0.1
    judged_fraction: float = 1.0
    train_queries: int = 0
    dev_queries: int = 0
    test_queries: int = 0
    unlabelled_queries: int = 0
    negatives: int = 0
    clicks_from_judgments: bool = False
    on_bad_row: OnBadRow = "stop"
    licence: str = ""
    seed: int = 0
    downloads: Path = Path("data/downloads")
    world: WorldConfig = field(default_factory=WorldConfig)

    def __post_init__(self):
        for name in ("dev_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a share between 0 and 1 is needed")
        if not 0 < self.judged_fraction <= 1:
            raise ValueError(f"judged_fraction is {self.judged_fraction}: a share above 0, at most 1 is needed")
        for name in ("train_queries", "dev_queries", "test_queries", "unlabelled_queries", "negatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: 0 or more is needed")


def main(config: Config) -> None:
    if config.source == "world":
        write_world(config.world, config.out)
        return
    rejects = config.out / "rejects.tsv"
    rejects.unlink(missing_ok=True)
    keep = Rejects(rejects) if config.on_bad_row == "reject" else None
    bad = BadRows(keep, remedy="--on-bad-row reject goes on without such rows")
    source = read_source(config, bad)
    check_usable(source, config)
    if config.source.startswith("dataset:"):
        _copy_clicks(Path(config.source.removeprefix("dataset:")), config.out)
    content = write_dataset(source, config, bad.count)
    if bad.count:
        LOGGER.warning("%d bad rows were left out; see %s", bad.count, rejects)
    LOGGER.info("%s: %s", config.out, content["counts"])


def _copy_clicks(source: Path, out: Path) -> None:
    """The click pairs and the raw log of a prepared dataset, as they are: its train clicks hold no judged query."""
    for name in ("clicks.parquet", "events.parquet"):
        if (source / name).is_file():
            with replacing(out / name) as aside:
                shutil.copyfile(source / name, aside)


def read_source(config: Config, bad: BadRows) -> JudgedSource:
    """The judged documents and queries of config.source. InputError if it is none of SOURCES."""
    kind, _, where = config.source.partition(":")
    whole = config.negatives > 0
    if kind == "beir" and where:
        return read_beir(Path(where), bad, whole)
    if kind == "msrd":
        return read_msrd(Path(where) if where else fetch_msrd(config.downloads / "msrd", MSRD_FILES), bad, whole)
    if kind == "ir" and where:
        return read_ir_dataset(where, bad, whole)
    if kind == "table" and where:
        return read_table_source(Path(where), parse_columns(config.columns), bad)
    if kind == "dataset" and where:
        if Path(where).resolve() == config.out.resolve():
            raise InputError(f"--out {config.out}: is the source itself")
        return read_dataset(Path(where), bad)
    raise InputError(f"--source {config.source}: one of {SOURCES} is expected")


def check_usable(source: JudgedSource, config: Config) -> None:
    """DataError unless some query has two documents of different grade: nothing could be trained or measured."""
    if not any(source.judged.values()):
        raise DataError(config.source, "no usable query: not one judged pair is left")
    for grades in source.judged.values():
        first: dict[str, int] = {}
        for (query_id, _), grade in grades.items():
            if first.setdefault(query_id, grade) != grade or (config.negatives and grade):
                return
    raise DataError(
        config.source,
        "no usable query: none has documents of different grades; where only relevant pairs are judged, "
        "--negatives 20 adds documents found by BM25 as grade 0",
    )


@dataclass
class _Pairs:
    """Judged pairs of one split, or candidates: (query id, doc id) -> grade, None where it is to be labelled."""

    grades: dict[tuple[str, str], int]

    def queries(self) -> list[str]:
        return list(dict.fromkeys(query_id for query_id, _ in self.grades))

    def of(self, queries: Iterable[str]) -> dict[tuple[str, str], int]:
        wanted = set(queries)
        return {pair: grade for pair, grade in self.grades.items() if pair[0] in wanted}


def write_dataset(source: JudgedSource, config: Config, rejected: int = 0) -> dict:
    """Split, sample and write the tables, dataset.json last. Returns the content of dataset.json."""
    splits = _splits(source, config)
    judged = {name: _Pairs({}) for name in SPLITS}
    dropped = 0
    queries_of = {name: {query_id for query_id, _ in source.judged.get(name, {})} for name in SPLITS}
    for given, grades in source.judged.items():
        for (query_id, doc_id), grade in grades.items():
            split = splits.split.get(query_id)
            # a query that the source has in two splits counts in the higher one, with that one's grades only
            if split is None or (given and given != split and query_id in queries_of[split]):
                dropped += 1
            else:
                judged[split].grades[query_id, doc_id] = grade
    unlabelled = _unlabelled(source, splits)
    limits = {"train": config.train_queries, "dev": config.dev_queries, "test": config.test_queries}
    if config.judged_fraction < 1:
        order = shuffled(judged["train"].queries(), config.seed + 1)
        keep = order[: max(1, round(config.judged_fraction * len(order)))]
        unlabelled |= judged["train"].of(set(order) - set(keep))
        judged["train"] = _Pairs(judged["train"].of(keep))
    for name in SPLITS:
        judged[name] = _limited(judged[name], limits[name], config.seed, 0)
    candidates = _limited(_Pairs(unlabelled), config.unlabelled_queries, config.seed, 2)
    for name in SPLITS:
        if not judged[name].grades:
            raise DataError(config.source, f"no usable query is left for the {name} split; give it more queries")
        if config.negatives:
            add_negatives(source, judged[name].grades, config.negatives)
    return _write(source, judged, candidates, splits, config, rejected, dropped)


def _splits(source: JudgedSource, config: Config) -> QuerySplits:
    given: dict[str, set[str]] = {}
    for split, grades in source.judged.items():
        for query_id, _ in grades:
            given.setdefault(query_id, set()).update({split} - {""})
    for query_id, _ in source.unlabelled:
        given.setdefault(query_id, set())
    queries = {query_id: source.queries[query_id] for query_id in given}
    found = assign_splits(
        queries, given, dev_fraction=config.dev_fraction, test_fraction=config.test_fraction, seed=config.seed
    )
    if found.removed:
        LOGGER.info("%d queries are near-identical to one of a held-out split and left out", len(found.removed))
    return found


def _unlabelled(source: JudgedSource, splits: QuerySplits) -> dict[tuple[str, str], int]:
    """The source's pairs without a grade, of queries that no held-out split has."""
    return {pair: 0 for pair in sorted(source.unlabelled) if splits.split.get(pair[0]) == "train"}


def _limited(pairs: _Pairs, limit: int, seed: int, stream: int) -> _Pairs:
    """At most limit queries (0: all), drawn by name and seed."""
    queries = pairs.queries()
    if not limit or len(queries) <= limit:
        return pairs
    return _Pairs(pairs.of(shuffled(queries, seed + stream)[:limit]))


def _write(source, judged, candidates, splits, config, rejected, dropped) -> dict:
    counts = {"documents": source.corpus_size, "queries_without_judgements": len(source.queries) - len(splits.split)}
    counts["queries_without_judgements"] -= len(splits.removed)
    counts |= {"queries_near_a_held_out_one": len(splits.removed), "judgements_of_those": dropped}
    counts["rejected_rows"] = rejected
    grades: dict[str, dict[str, int]] = {}
    files = []
    for name in SPLITS:
        table = pair_table(source, judged[name].grades, config.seed, graded=True)
        files.append(config.out / f"judgments/{name}.parquet")
        counts[f"judgments_{name}"] = write_table(files[-1], "judgments", table)
        counts[f"queries_{name}"] = len(judged[name].queries())
        tally = Counter(judged[name].grades.values())
        grades[name] = {str(grade): tally[grade] for grade in range(MAX_GRADE + 1)}
    files.append(config.out / "candidates.parquet")
    table = pair_table(source, candidates.grades, config.seed, graded=False)
    counts["candidates"] = write_table(files[-1], "candidates", table)
    counts["queries_candidates"] = len(candidates.queries())
    content: dict = {"source": config.source, "licence": config.licence or source.licence}
    clicks = config.out / "clicks.parquet"
    if config.clicks_from_judgments:
        write_table(clicks, "clicks", clicks_from_judgments(read_table(files[0], "judgments")))
        content["clicks_are"] = "the relevant pairs of the judged train split, weight = grade, not clicks"
    if clicks.is_file():
        counts["clicks"] = len(read_table(clicks, "clicks"))
        files.append(clicks)
    settings = ("columns", "dev_fraction", "test_fraction", "judged_fraction", "negatives", "seed", "on_bad_row")
    content |= {
        "counts": counts,
        "grades": grades,
        "fingerprint": fingerprint(*files),
        "near_identical": {"groups": splits.groups, "largest": splits.largest_group},
        "settings": {name: getattr(config, name) for name in settings},
    }
    write_json(config.out / "dataset.json", content)
    return content


if __name__ == "__main__":
    run(main, Config, example="python -m training.prepare_data --source beir:path/to/set --out data/set")
