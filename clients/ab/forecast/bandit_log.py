"""Logs of policies that draw one item at random, with its probability, in the format of the Open Bandit Dataset.

Saito, Aihara, Matsutani and Narita, "Open Bandit Dataset and Pipeline" (NeurIPS 2021 datasets, arXiv 2008.07146):
columns item_id, position, click, propensity_score. What the other policy would show is what its own log shows, by
position; its clicks are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
from numpy.typing import NDArray

from clients.ab.forecast.estimators import Floats, LoggedRows
from ranking.database import literal
from ranking.errors import DataError

FOLDS = 5
PRIOR_IMPRESSIONS = 100.0  # an item's click rate is drawn towards its position's as if it had been shown so often


@dataclass(frozen=True)
class BanditLog:
    """n impressions. item, position: int [n], from 0; click, probability: float [n]."""

    item: NDArray[np.int64]
    position: NDArray[np.int64]
    click: Floats
    probability: Floats


def read_bandit_log(database: duckdb.DuckDBPyConnection, path: Path) -> BanditLog:
    """A CSV file, gzipped or not. DataError if it cannot be read or a value is none that it can be."""
    if not path.is_file():
        raise DataError(path, "no such file")
    try:
        columns = database.execute(f"""
            SELECT item_id::BIGINT AS item, "position"::BIGINT AS position, click::DOUBLE AS click,
                   propensity_score::DOUBLE AS probability FROM read_csv({literal(path)})
        """).fetchnumpy()
    except duckdb.Error as problem:
        raise DataError(path, f"not a bandit log: {' '.join(str(problem).split())[:200]}") from problem
    item, position, click, probability = (np.ma.filled(column, -1) for column in columns.values())
    for name, bad in (
        ("item_id", item < 0),
        ("position", position < 0),
        ("click", ~((click >= 0) & (click <= 1))),  # no number is neither above nor below
        ("propensity_score", ~((probability > 0) & (probability <= 1))),
    ):
        if bad.any():
            raise DataError(path, f"{name} is missing or outside its range", int(bad.argmax()) + 1)
    return BanditLog(item, position, click, probability)


def rows_of(logged: BanditLog, target: BanditLog) -> LoggedRows:
    """The estimators' rows: each impression is a page of one item, and a user of its own."""
    of_item, items = _numbered(logged.item, target.item)
    of_position, positions = _numbered(logged.position, target.position)
    logged, target = (
        BanditLog(item, position, log.click, log.probability)
        for log, item, position in zip((logged, target), of_item, of_position)
    )
    shown = np.zeros((items, positions))
    np.add.at(shown, (target.item, target.position), 1)
    wanted = shown / np.maximum(shown.sum(0), 1)
    # the other policy's pages are those of the log: only items differ, not positions
    weight = wanted[logged.item, logged.position] / logged.probability
    rates = _cross_fitted_rates(logged, items, positions)
    fold = np.arange(len(logged.item)) % FOLDS
    count = len(logged.item)
    return LoggedRows(
        np.arange(count),
        logged.click,
        weight,
        np.ones(count),
        rates[fold, logged.item, logged.position],
        np.arange(count),
        np.ones(count),
        (rates * wanted).sum(1)[fold, logged.position],
    )


def _numbered(*of_logs: NDArray[np.int64]) -> tuple[list[NDArray[np.int64]], int]:
    """Ids of several logs as numbers from 0, and how many there are: an id may be of any size, a table may not."""
    ids = np.unique(np.concatenate(of_logs))
    return [np.searchsorted(ids, one) for one in of_logs], len(ids)


def _cross_fitted_rates(logged: BanditLog, items: int, positions: int) -> Floats:
    """Click rates of items by position on the impressions outside each fold, [folds, items, positions]."""
    fold = np.arange(len(logged.item)) % FOLDS
    sums = np.zeros((2, FOLDS, items, positions))
    for values, of in ((logged.click, sums[0]), (np.ones(len(fold)), sums[1])):
        np.add.at(of, (fold, logged.item, logged.position), values)
    clicks, shown = (of.sum(0) - of for of in sums)
    mean = clicks.sum(1, keepdims=True) / np.maximum(shown.sum(1, keepdims=True), 1)
    return (clicks + PRIOR_IMPRESSIONS * mean) / (shown + PRIOR_IMPRESSIONS)
