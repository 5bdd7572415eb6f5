"""What the A/B report measures, each metric in one place: name, how it is counted, its unit, which way is better.

To add a metric: add a line to RATIO_METRICS (a ratio of two per-user totals) or to QUANTILE_METRICS, and, if it needs
something of a page that is not there yet, a line to PAGE_COLUMNS. Loading, table, verdict and page take it from here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PageColumn:
    """What the report keeps of a page. Both are DuckDB's SQL (ranking/spark_sql.py); None where a log cannot tell.

    of_exposure: over one row of the table `exposures`; of_events: an aggregate over the `events` rows of one page.
    """

    of_exposure: str
    of_events: str | None


PAGE_COLUMNS: dict[str, PageColumn] = {
    # of events a document's clicks may be counted, where the router says whether there was one; Spark takes no number
    # for a condition
    "clicks": PageColumn("clicks::INT", "sum((clicked::INT > 0)::INT)::INT"),
    "dwell": PageColumn("dwell_seconds::FLOAT", "sum(CASE WHEN clicked::INT > 0 THEN dwell_seconds ELSE 0 END)::FLOAT"),
    "fell_back": PageColumn("fallback != ''", None),
    "latency_ms": PageColumn("latency_ms", None),
}


@dataclass(frozen=True)
class Unit:
    """How a metric's value is written. factor: from the stored value to the shown one."""

    text: str
    factor: float = 1.0
    decimals: int = 1

    def show(self, value: float) -> str:
        """The value as it stands in the table."""
        return f"{value * self.factor:.{self.decimals}f}{self.text}"


SHARE = Unit("%", factor=100.0, decimals=2)
SECONDS = Unit(" s")
MILLISECONDS = Unit(" ms")


@dataclass(frozen=True)
class RatioMetric:
    """Sum of one per-user total over the sum of another; the variance is the delta method's over users.

    numerator, denominator: one SQL aggregate each over a user's pages; `$dwell_cap` stands for the cap of one click's
    dwell. needs: the PAGE_COLUMNS that the metric reads. decides: the verdict looks at it (Holm-adjusted); else it is a
    guardrail.
    """

    name: str
    numerator: str
    denominator: str
    unit: Unit
    needs: tuple[str, ...]
    higher_is_better: bool = True
    decides: bool = False


@dataclass(frozen=True)
class QuantileMetric:
    """A quantile of a page's value, its variance clustered by user. column: one of PAGE_COLUMNS; level in (0, 1)."""

    name: str
    column: str
    level: float
    unit: Unit
    higher_is_better: bool = False


PAGE_CTR = RatioMetric("page CTR", "sum((clicks > 0)::INT)", "count(*)", SHARE, ("clicks",), decides=True)

# the first three are the online table of the paper; the others are guardrails
RATIO_METRICS = (
    PAGE_CTR,
    RatioMetric("user CTR", "max((clicks > 0)::INT)", "max(1)", SHARE, ("clicks",), decides=True),
    RatioMetric(
        "dwell per click",
        "sum(least(dwell, $dwell_cap * clicks))",
        "sum(clicks)",
        SECONDS,
        ("dwell", "clicks"),
        decides=True,
    ),
    RatioMetric("fallback share", "sum(fell_back::INT)", "count(*)", SHARE, ("fell_back",), higher_is_better=False),
)
QUANTILE_METRICS = (
    QuantileMetric("latency p50", "latency_ms", 0.50, MILLISECONDS),
    QuantileMetric("latency p95", "latency_ms", 0.95, MILLISECONDS),
    QuantileMetric("latency p99", "latency_ms", 0.99, MILLISECONDS),
)
