"""CSV files as spreadsheets and scripts write them: stray quotes, texts of several lines, nameless columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranking.errors import DataError
from ranking.schema import Rejects
from training.sources.row_readers import BadRows
from training.sources.separated_rows import MAX_RECORD_LINES, separated_rows

GOOD = [f"lamp {i},Lamp number {i},{i % 3}" for i in range(40)]


def table(folder: Path, lines: list[str], header: str = "query,title,grade", name: str = "mine.csv") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def read(path: Path, rejects: Path | None = None) -> tuple[list[tuple[int, dict]], BadRows]:
    bad = BadRows(Rejects(rejects) if rejects else None)
    return list(separated_rows(path, bad)), bad


@pytest.mark.parametrize("reject", [False, True])
def test_a_quote_that_is_never_closed_is_the_whole_files_fault(reject, tmp_path):
    lines = [*GOOD[:10], 'lamp,"24 inch lamp,3', *GOOD[10:]]
    with pytest.raises(DataError, match=r"mine\.csv, row 12: a quote opens here and is never closed"):
        read(table(tmp_path, lines), tmp_path / "rejects.tsv" if reject else None)


def test_the_row_is_named_in_which_the_quote_opens_not_the_one_in_which_its_record_begins(tmp_path):
    lines = ['"lamp\n""of"" two lines","24 inch lamp,3', *GOOD]
    with pytest.raises(DataError, match=r"row 3: a quote opens here and is never closed"):
        read(table(tmp_path, lines))


@pytest.mark.parametrize("swallowed", [1, 2, 12])
def test_a_quote_that_closes_in_a_later_row_loses_no_row_silently(swallowed, tmp_path):
    lines = [*GOOD[:3], 'lamp,"24 inch lamp,3', *GOOD[: swallowed - 1], 'lamp,lamp of 24",1', *GOOD[20:]]
    with pytest.raises(DataError, match=f"row 5: a quote opens here and closes in row {5 + swallowed}, behind what"):
        read(table(tmp_path, lines), tmp_path / "rejects.tsv")


def test_every_line_that_a_stray_quote_makes_unreadable_is_counted(tmp_path):
    lines = [*GOOD[:3], 'lamp,"24 inch lamp,3', *GOOD[3:10], 'lamp,"quoted, with comma",1', *GOOD[10:]]
    rows, bad = read(table(tmp_path, lines), tmp_path / "rejects.tsv")
    assert len(rows) + bad.count == len(lines) and bad.count == 9
    assert [number for number, _ in rows] == [2, 3, 4, *range(14, 44)]
    assert "(a quoted field makes rows 5 to 13 one)" in (tmp_path / "rejects.tsv").read_text(encoding="utf-8")


def test_lines_of_a_row_with_too_many_fields_are_all_counted(tmp_path):
    lines = [*GOOD[:3], 'lamp,"24 inch,3', *GOOD[3:6], 'x,lamp of 24",more,1', *GOOD[10:]]
    rows, bad = read(table(tmp_path, lines), tmp_path / "rejects.tsv")
    assert len(rows) + bad.count == len(lines) and bad.count == 5
    assert bad.first.endswith("row 5: 4 fields, the header has 3 (a quoted field makes rows 5 to 9 one)")


def test_a_bad_row_among_those_that_a_quote_swallows_hides_nothing(tmp_path):
    lines = [*GOOD[:3], 'lamp,"24 inch,3', *GOOD[3:6], 'x,y,lamp of 24",1', *GOOD[10:]]
    with pytest.raises(DataError, match="row 5: a quote opens here and closes in row 9"):
        read(table(tmp_path, lines))


def test_a_quote_that_stays_open_for_too_long_ends_the_reading(tmp_path):
    path = table(tmp_path, ['lamp,"24 inch,3', *["lamp,lamp,1"] * (MAX_RECORD_LINES + 10), 'lamp,lamp",1'])
    with pytest.raises(DataError, match=f"row 2: a quote opens here and is not closed within {MAX_RECORD_LINES} lines"):
        read(path, tmp_path / "rejects.tsv")


def test_texts_of_several_lines_and_quotes_within_texts_are_read(tmp_path):
    text = 'Shades, bulbs, cords.\nOf glass, of 24", red\nand more, too,\n' + "width, cm, 24\n" * 30
    lines = ['lamp,"' + text.replace('"', '""') + '",2', 'kettle,19" kettle,1', 'pot,"one\ntwo",0']
    rows, _ = read(table(tmp_path, lines))
    assert [row["title"] for _, row in rows] == [text, '19" kettle', "one\ntwo"]
    assert [number for number, _ in rows] == [2, 36, 37]  # each the first of its lines


def test_nameless_columns_without_values_are_a_spreadsheets(tmp_path):
    lines = [*(f"{line},," for line in GOOD[:5]), "lamp,Lamp, of glass,2,"]
    rows, bad = read(table(tmp_path, lines, "query,title,grade,,"), tmp_path / "rejects.tsv")
    assert [list(row) for _, row in rows] == [["query", "title", "grade"]] * 5
    assert bad.count == 1 and bad.first.endswith("row 7: a value behind the last column that has a name")
    rows, _ = read(table(tmp_path, [f"{i},{line}" for i, line in enumerate(GOOD)], ",query,title,grade"))
    assert rows[7][1] == {"query": "lamp 7", "title": "Lamp number 7", "grade": "1"}  # pandas' index is no column


def test_a_blank_line_within_a_quoted_text_is_a_part_of_it(tmp_path):
    """Seen: "two\\n\\nparagraphs" were one."""
    rows, _ = read(table(tmp_path, ["", 'lamp,"two', "", " ", 'paragraphs",1', "", "  ", "lamp,b,0", ""]))
    assert rows == [
        (3, {"query": "lamp", "title": "two\n\n \nparagraphs", "grade": "1"}),
        (9, {"query": "lamp", "title": "b", "grade": "0"}),
    ]


@pytest.mark.parametrize("mark", [",", ";"])
def test_a_spreadsheets_empty_rows_are_passed_over(mark, tmp_path):
    lines = [line.replace(",", mark) for line in (GOOD[0], ",,", GOOD[1], " ,, ", ",,")]
    rows, bad = read(table(tmp_path, lines, f"query{mark}title{mark}grade"), tmp_path / "rejects.tsv")
    assert [number for number, _ in rows] == [2, 4] and not bad.count


@pytest.mark.parametrize("mark", [";", "|", "\t", ","])
def test_excels_line_for_the_separator_is_understood(mark, tmp_path):
    path = tmp_path / "mine.csv"
    header = mark.join(["query", "title", "grade"])
    lines = [f"sep={mark}", header, *(line.replace(",", mark) for line in GOOD)]
    path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    rows, _ = read(path)
    assert rows[0] == (3, {"query": "lamp 0", "title": "Lamp number 0", "grade": "0"}) and len(rows) == 40


@pytest.mark.parametrize("mark", [";", "|", "\t"])
def test_a_header_with_a_comma_in_a_name_is_separated_by_what_it_has_more_of(mark, tmp_path):
    """Seen: one comma in the name of a column made the whole file one separated by commas."""
    header, line = (mark.join(cells) for cells in (["query", "title, short", "grade"], ["lamp", "Lamp", "1,5"]))
    rows, _ = read(table(tmp_path, [line], header))
    assert rows == [(2, {"query": "lamp", "title, short": "Lamp", "grade": "1,5"})]
    rows, _ = read(table(tmp_path, ["lamp,Lamp,1"], f"query,title{mark}short,grade"))
    assert rows == [(2, {"query": "lamp", f"title{mark}short": "Lamp", "grade": "1"})]


def test_an_ending_in_capitals_is_the_same_ending(tmp_path):
    rows, _ = read(table(tmp_path, ['"b\tc\t1'], "query\ttitle\tgrade", "MINE.TSV"))
    assert rows == [(2, {"query": '"b', "title": "c", "grade": "1"})]
