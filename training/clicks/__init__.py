"""From a click log to click pairs: checked reading in DuckDB, normalised queries, examination propensities."""
