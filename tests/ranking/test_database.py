"""Text and paths in DuckDB's SQL mean themselves, whatever characters they hold."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranking.database import DuckDbSettings, literal

# each stands beside a file that DuckDB's patterns would take in its place, or beside it
NAMES = {
    "log[1].parquet": "log1.parquet",
    "a*.parquet": "ab.parquet",
    "c?.parquet": "cd.parquet",
    "it's');--.parquet": "x",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_by_its_own_name_alone(tmp_path, name):
    """Seen: `log[1].parquet` was read from log1.parquet, and `a*.parquet` from every file that begins so."""
    for number, file in enumerate((name, NAMES[name])):
        pq.write_table(pa.table({"number": [number]}), tmp_path / file)
    with DuckDbSettings().open_database() as connection:
        for paths in (tmp_path / name, [tmp_path / name]):
            assert connection.execute(f"SELECT * FROM read_parquet({literal(paths)})").fetchall() == [(0,)]


def test_a_text_is_the_text_that_it_was():
    with DuckDbSettings().open_database() as connection:
        for text in ("it's", "'; DROP TABLE x; --", "a*[b]?", "\\", "", "\u200b"):
            assert connection.execute(f"SELECT {literal(text)}").fetchone() == (text,)
