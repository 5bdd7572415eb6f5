"""Writes a dataset folder from judged pairs: splits, samples, negatives, candidates, clicks, and dataset.json."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ranking.bm25 import Bm25
from ranking.card import fingerprint
from ranking.errors import DataError
from ranking.files import write_json
from ranking.schema import MAX_GRADE, read_table, write_table
from ranking.text import normalise
from training.sources.candidate_pairs import CandidateSettings, candidate_pairs
from training.sources.judged_collections import UNSPLIT, JudgedSource, Pair, Text
from training.sources.query_splits import SPLITS, QuerySplits, assign_splits, shuffled
from training.sources.simulated_clicks import ClickSimulationSettings, write_simulated_log

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DatasetSettings(CandidateSettings, ClickSimulationSettings):
    """How judged pairs become a dataset folder: its splits, samples and extra tables.

    Args:
        dev_fraction: share of the train queries that become dev where the source has none
        test_fraction: share of the queries that become test where the source has none
        judged_fraction: share of the train queries that keep their grades; the others' documents become candidates
        train_queries: at most this many train queries keep their grades; 0 for all. The others' documents become
            candidates
        dev_queries: at most this many dev queries; 0 for all
        test_queries: at most this many test queries; 0 for all
        negatives: BM25's best unjudged documents added to each query as grade 0; for sets where only relevant ones are
            judged
        clicks_from_judgments: write clicks.parquet from the relevant train pairs, for continued pre-training without a
            log
        resplit: forget the source's splits and draw all of them anew, by query: a collection with a test split alone
            gets the train and dev splits that training needs
        seed: draws splits and samples; another seed, another draw
    """

    dev_fraction: float = 0.1
    test_fraction: float = 0.1
    judged_fraction: float = 1.0
    train_queries: int = 0
    dev_queries: int = 0
    test_queries: int = 0
    negatives: int = 0
    clicks_from_judgments: bool = False
    resplit: bool = False
    seed: int = 0

    def __post_init__(self):
        CandidateSettings.__post_init__(self)
        ClickSimulationSettings.__post_init__(self)
        for name in ("dev_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a share between 0 and 1 is needed")
        if not 0 < self.judged_fraction <= 1:
            raise ValueError(f"judged_fraction is {self.judged_fraction}: a share above 0, at most 1 is needed")
        for name in ("train_queries", "dev_queries", "test_queries", "negatives", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: 0 or more is needed")
        if self.simulate_clicks != "none" and self.judged_fraction == 1:
            raise ValueError(
                "simulate_clicks needs queries whose judgments are withheld: --judged-fraction 0.05 withholds 95%"
            )
        if self.simulate_clicks != "none" and self.clicks_from_judgments:
            raise ValueError("simulate_clicks and clicks_from_judgments are two ways to the same table: give one")


@dataclass
class _Pairs:
    """Judged pairs of one split: (query id, doc id) -> grade."""

    grades: dict[Pair, int]

    def queries(self) -> list[str]:
        return list(dict.fromkeys(query_id for query_id, _ in self.grades))

    def of(self, queries: Iterable[str]) -> dict[Pair, int]:
        wanted = set(queries)
        return {pair: grade for pair, grade in self.grades.items() if pair[0] in wanted}


def write_dataset(
    source: JudgedSource,
    settings: DatasetSettings,
    out: Path,
    *,
    origin: str,
    licence: str = "",
    rejected: int = 0,
    reading: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Split, sample and write the tables, dataset.json last. Returns the content of dataset.json.

    origin: what dataset.json and errors name as the source; licence: where the source does not say its own; rejected:
    bad rows that were left out; reading: how the source was read, for dataset.json's settings. A split that the source
    cannot fill is written empty, with a warning. DataError if all are empty.
    """
    if settings.resplit:
        source.judged = {UNSPLIT: {pair: grade for grades in source.judged.values() for pair, grade in grades.items()}}
    splits = _splits(source, settings)
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
                judged[split].grades[query_id, doc_id] = int(grade)
    withheld: dict[Pair, int] = {}
    if judged["train"].grades:
        order = shuffled(judged["train"].queries(), settings.seed + 1)
        keep = order[: max(1, round(settings.judged_fraction * len(order)))][: settings.train_queries or None]
        withheld = judged["train"].of(set(order) - set(keep))
        judged["train"] = _Pairs(judged["train"].of(keep))
    held_out = [*judged["dev"].queries(), *judged["test"].queries()]
    for name, limit in {"dev": settings.dev_queries, "test": settings.test_queries}.items():
        judged[name] = _limited(judged[name], limit, settings.seed)
    _warn_of_empty_splits({name: len(judged[name].grades) for name in SPLITS}, splits, origin)
    unjudged = len(source.queries.keys() - source.judged_queries())  # before titles are made queries
    candidates, found = candidate_pairs(
        source, judged["train"].grades, withheld, held_out, settings, seed=settings.seed
    )
    for name in SPLITS:
        if settings.negatives:
            add_negatives(source, judged[name].grades, settings.negatives)
        _warn_of_equal_grades(name, judged[name].grades)
    counts = {"documents": source.corpus_size, "queries_without_judgments": unjudged}
    counts |= {"queries_near_a_held_out_one": len(splits.removed), "judgments_of_those": dropped}
    counts["rejected_rows"] = rejected
    content = {
        "source": origin,
        "licence": licence or source.licence,
        "near_identical": {"groups": splits.groups, "largest": splits.largest_group},
        "candidates_are": found,
        "settings": {f.name: getattr(settings, f.name) for f in fields(DatasetSettings)} | (reading or {}),
    }
    if settings.simulate_clicks != "none":
        if not withheld:
            raise DataError(origin, "no train query is withheld: there is nobody to click; lower --judged-fraction")
        # click pairs of an earlier log are not this log's
        (out / "clicks.parquet").unlink(missing_ok=True)
        log = write_simulated_log(source, withheld, settings, settings.seed, out / "events.parquet")
        LOGGER.info(
            "simulated clicks: %d of %d events clicked, by %s users", log["clicks"], log["events"], log["users"]
        )
        content["simulated_clicks"] = log
    return _write_tables(source, judged, candidates, settings, out, counts, content)


def _warn_of_empty_splits(judgments: dict[str, int], splits: QuerySplits, origin: str) -> None:
    """Say what cannot be done without a split, and what can be done about it. DataError if all are empty.

    judgments: split -> how many.
    """
    if not any(judgments.values()):
        raise DataError(origin, "no usable query is left for any split")
    lacking = {
        "train": "a student can learn from labels of the candidates, but nothing from judgments",
        "dev": "no checkpoint can be selected and no gate be passed",
        "test": "rankers are measured with training.evaluate --split dev or train only",
    }
    advice = "--resplit draws train, dev and test anew, by query"
    if splits.groups < len(SPLITS):  # nothing to draw from
        count = len(splits.split)
        advice = f"of the {count} judged queries only {splits.groups} are not near-identical, and such share a split"
    for name, consequence in lacking.items():
        if not judgments[name]:
            LOGGER.warning("the %s split is empty: %s; %s", name, consequence, advice)


def _warn_of_equal_grades(split: str, grades: dict[Pair, int]) -> None:
    """Say so where fewer than half of a split's queries can be ranked, that is, have two documents of other grades."""
    grades_of: dict[str, set[int]] = {}
    for (query_id, _), grade in grades.items():
        grades_of.setdefault(query_id, set()).add(grade)
    ranked = sum(len(values) > 1 for values in grades_of.values())
    if 2 * ranked < len(grades_of):
        LOGGER.warning(
            "the %s split: only %d of %d queries have documents of different grades; on the others every order is "
            "equally good, so nothing is learned or measured",
            split, ranked, len(grades_of),
        )  # fmt: skip


def _splits(source: JudgedSource, settings: DatasetSettings) -> QuerySplits:
    given: dict[str, set[str]] = {}
    for split, grades in source.judged.items():
        for query_id, _ in grades:
            given.setdefault(query_id, set()).update({split} - {UNSPLIT})
    queries = {query_id: source.queries[query_id] for query_id in given}
    found = assign_splits(
        queries, given, dev_fraction=settings.dev_fraction, test_fraction=settings.test_fraction, seed=settings.seed
    )
    if several := sum(len(splits) > 1 for splits in given.values()):
        LOGGER.warning(
            "%d queries stand in several splits of the source: each counts in the highest one alone, train under dev "
            "under test, with its judgments there", several,
        )  # fmt: skip
    if found.removed:
        LOGGER.info("%d queries are near-identical to one of a held-out split and left out", len(found.removed))
    return found


def _limited(pairs: _Pairs, limit: int, seed: int) -> _Pairs:
    """At most limit queries (0: all), drawn by name and seed."""
    queries = pairs.queries()
    if not limit or len(queries) <= limit:
        return pairs
    return _Pairs(pairs.of(shuffled(queries, seed)[:limit]))


def _write_tables(
    source: JudgedSource,
    judged: dict[str, _Pairs],
    candidates: Iterable[Pair],
    settings: DatasetSettings,
    out: Path,
    counts: dict[str, int],
    content: dict[str, Any],
) -> dict[str, Any]:
    """Write every table, add what they hold to the content of dataset.json, and write that.

    The tables take the place of earlier ones all at once, at the end: half of two draws would leak test queries.
    """
    with _aside(out) as aside:
        files = _fill(source, judged, candidates, settings, out, aside, counts, content)
        (out / "dataset.json").unlink(missing_ok=True)
        for file in files:
            (out / file).parent.mkdir(exist_ok=True)
            if (aside / file).is_file():
                (aside / file).replace(out / file)
    content["fingerprint"] = fingerprint(*(out / file for file in files))
    write_json(out / "dataset.json", content)
    return content


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder in `out` to fill, gone when the block ends; what a killed run left of it goes first."""
    for left in out.glob(".prepare-*"):
        shutil.rmtree(left, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=out) as folder:
        yield Path(folder)


def _fill(
    source: JudgedSource,
    judged: dict[str, _Pairs],
    candidates: Iterable[Pair],
    settings: DatasetSettings,
    out: Path,
    aside: Path,
    counts: dict[str, int],
    content: dict[str, Any],
) -> list[str]:
    """Write the tables into `aside`, their counts into `content`; returns the names of what the dataset is made of."""
    grades: dict[str, dict[str, int]] = {}
    files = []
    for name in SPLITS:
        table = pair_table(source, judged[name].grades, settings.seed, graded=True)
        files.append(f"judgments/{name}.parquet")
        counts[f"judgments_{name}"] = write_table(aside / files[-1], "judgments", table)
        counts[f"queries_{name}"] = len(judged[name].queries())
        tally = Counter(judged[name].grades.values())
        grades[name] = {str(grade): tally[grade] for grade in range(MAX_GRADE + 1)}
    files.append("candidates.parquet")
    table = pair_table(source, dict.fromkeys(candidates, 0), settings.seed, graded=False)
    counts["candidates"] = write_table(aside / files[-1], "candidates", table)
    counts["queries_candidates"] = len(table.column("query_id").unique())
    clicks = out / "clicks.parquet"
    if settings.clicks_from_judgments:
        clicks = aside / "clicks.parquet"
        write_table(clicks, "clicks", clicks_from_judgments(read_table(aside / files[0], "judgments")))
        content["clicks_are"] = "the relevant pairs of the judged train split, weight = grade, not clicks"
    if clicks.is_file():
        counts["clicks"] = len(read_table(clicks, "clicks"))
        files.append("clicks.parquet")
    content |= {"counts": counts, "grades": grades}
    return files


def pair_table(source: JudgedSource, grades: dict[Pair, int], seed: int, graded: bool) -> pa.Table:
    """A judgments table (graded) or candidates table, its rows by query.

    Within a query the documents stand in a drawn order: ties break by it, and judgment files often list the relevant
    documents first.
    """
    of_query: dict[str, list[str]] = {}
    for query_id, doc_id in grades:
        of_query.setdefault(query_id, []).append(doc_id)
    pairs = [(q, d) for q, documents in of_query.items() for d in shuffled(documents, seed)]
    query_ids, doc_ids = [q for q, _ in pairs], [d for _, d in pairs]
    columns = {
        "query_id": pa.array(query_ids, pa.string()),
        "doc_id": pa.array(doc_ids, pa.string()),
        "query": pa.array([source.queries[q] for q in query_ids], pa.string()),
        "title": pa.array([source.text(pair)[0] for pair in pairs], pa.string()),
        "summary": pa.array([source.text(pair)[1] for pair in pairs], pa.string()),
    }
    if graded:
        columns["grade"] = pa.array([grades[pair] for pair in pairs], pa.int8())
    return pa.table(columns)


def clicks_from_judgments(judgments: pa.Table) -> pa.Table:
    """The relevant pairs as a clicks table: per normalised query and document the best grade, as its weight."""
    relevant = judgments.filter(pc.greater(judgments.column("grade"), 0))
    best: dict[tuple[str, str], dict] = {}
    for row in relevant.to_pylist():
        key = (normalise(row["query"]).lower(), row["doc_id"])
        if key not in best or best[key]["weight"] < row["grade"]:
            best[key] = {"query": key[0], "weight": float(row["grade"])} | {
                name: row[name] for name in ("doc_id", "title", "summary")
            }
    names = ("query", "doc_id", "title", "summary", "weight")
    return pa.table({name: [row[name] for row in best.values()] for name in names})


def add_negatives(source: JudgedSource, grades: dict[Pair, int], count: int) -> None:
    """Add BM25's best unjudged documents of each query as grade 0, but none that reads as a judged one does."""
    doc_ids = list(source.documents)
    index = Bm25(list(source.documents.values()))
    judged: dict[str, set[Text]] = {}
    for pair in grades:
        judged.setdefault(pair[0], set()).update((source.text(pair), source.documents[pair[1]]))
    for (query_id, texts), scores in zip(judged.items(), index.scores([source.queries[q] for q in judged])):
        new: list[Pair] = []
        for i in np.argsort(-scores, kind="stable"):
            if len(new) == count or scores[i] <= 0:
                break
            pair = (query_id, doc_ids[i])
            if pair not in grades and source.documents[doc_ids[i]] not in texts:
                new.append(pair)
        grades.update(dict.fromkeys(new, 0))
