"""What DuckDB's SQL becomes for Spark, where sqlglot alone would leave or change its meaning."""

from __future__ import annotations

import pytest

from ranking.spark_sql import spark_sql


@pytest.mark.parametrize(
    ("duckdb", "spark"),
    [
        ("quantile_cont(rate, $level) FILTER (shown > 2)", "PERCENTILE(rate, :level) FILTER(WHERE shown > 2)"),
        ("list_extract(teams, 2)", "TRY_ELEMENT_AT(teams, 2)"),
        ("array_length(teams)", "SIZE(teams)"),
        ("list_position(documents, 'd')", "NULLIF(ARRAY_POSITION(documents, 'd'), 0)"),
        ("isfinite(dwell)", "(ABS(dwell) < CAST('inf' AS DOUBLE))"),
        ("strlen(query)", "OCTET_LENGTH(query)"),
        (r"regexp_matches(query, '[^\x{20}]')", r"query RLIKE '[^\\x{20}]'"),  # Spark reads backslashes in a text
        ('"it\'s `odd`"', "`it's ``odd```"),
    ],
)
def test_functions_keep_their_meaning(duckdb, spark):
    assert spark_sql(f"SELECT {duckdb} FROM log") == f"SELECT {spark} FROM log"
