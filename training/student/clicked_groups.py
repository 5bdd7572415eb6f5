"""A click log's shown documents as the groups that a student or baseline trains on, corrected for position bias.

A document's target is its number of satisfied clicks over its expected examinations, the sum of the propensities of the
positions it was shown at (clicks over expected clicks, Zhang and Jones, WWW 2007; the position-based model of Joachims,
Swaminathan and Schnabel, WSDM 2017).
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ranking.errors import InputError
from ranking.schema import read_table
from ranking.text import StudentFormat
from training.student.student_groups import groups_of, with_different_targets
from training.trainer.group_batches import RankingGroups

LOGGER = logging.getLogger(__name__)


def clicked_groups(path: Path, text_format: StudentFormat, smoothing: float) -> RankingGroups:
    """The groups of a shown_documents file, targets click rates. InputError if no two documents of a query differ."""
    rows = read_table(path, "shown_documents")
    rates = click_rates(rows, smoothing)
    rows = rows.append_column("query_id", rows.column("query")).append_column("click_rate", pa.array(rates))
    groups = with_different_targets(groups_of([rows], "click_rate", text_format))
    LOGGER.info("%s: %d documents shown for %d queries", path, len(groups.targets), len(groups))
    return groups


def click_rates(shown: pa.Table, smoothing: float) -> NDArray[np.float32]:
    """Clicks over expected examinations of each row, float32 [rows], pulled to the log's mean rate by `smoothing`.

    smoothing: examinations at the mean rate that every document is given beside its own. A document that nobody can
    have seen has the mean rate: it stands below what was clicked and above what was seen and skipped. InputError if
    nothing was clicked.
    """
    clicks, examinations = (shown.column(name).to_numpy().astype(np.float64) for name in ("clicks", "examinations"))
    if not clicks.sum():
        raise InputError("no shown document was clicked: nothing can be learnt from this log")
    mean_rate = clicks.sum() / examinations.sum()
    return ((clicks + smoothing * mean_rate) / (examinations + smoothing)).astype(np.float32)
