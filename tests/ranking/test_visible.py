"""Which text counts as visible: one answer from Python, Arrow and DuckDB for every code point, also when normalised."""

from __future__ import annotations

import unicodedata

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranking.text import normalise
from ranking.visible import SEPARATORS, UNDRAWN, VISIBLE_RE2, is_visible
from training.clicks.normalised_queries import normalise_query

INVISIBLE = [chr(code) for first, last in SEPARATORS + UNDRAWN for code in range(first, last + 1)]
every_text = st.text(st.characters(exclude_categories=[]))
invisible_text = st.text(st.sampled_from(INVISIBLE))


@pytest.fixture(scope="module")
def code_points() -> pa.Table:
    """Every code point that UTF-8 can carry, and what Python says of it."""
    numbers = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = [chr(code) for code in numbers]
    return pa.table({"code": numbers, "text": texts, "visible": list(map(is_visible, texts))})


def test_arrow_sees_what_python_sees_in_every_code_point(code_points):
    assert pc.match_substring_regex(code_points["text"], VISIBLE_RE2).equals(code_points["visible"])


def test_duckdb_sees_what_python_sees_in_every_code_point(code_points):
    different = "SELECT code FROM code_points WHERE regexp_matches(text, ?) <> visible"
    assert duckdb.execute(different, [VISIBLE_RE2]).fetchall() == []


def test_every_code_point_stays_visible_or_invisible_when_it_is_normalised():
    for code in range(0x110000):
        text = chr(code)
        assert is_visible(normalise(text)) is is_visible(text), f"U+{code:04X}"
        if text.lower() != text:
            assert is_visible(normalise_query(text)), f"U+{code:04X}"


@given(every_text)
def test_a_text_stays_visible_or_invisible_when_it_is_normalised(text):
    assert is_visible(normalise(text)) is is_visible(text)
    assert is_visible(normalise_query(text)) is is_visible(text)


@given(invisible_text)
def test_invisible_characters_never_join_into_a_visible_one(text):
    assert not is_visible(text) and not is_visible(normalise(text)) and not is_visible(normalise_query(text))


def test_white_space_controls_and_format_characters_are_invisible_and_letters_of_all_scripts_are_not():
    for code in range(0x110000):
        text = chr(code)
        kind = unicodedata.category(text)
        if kind in ("Zs", "Zl", "Zp", "Cc", "Cs") or text.isspace():
            assert not is_visible(text), f"U+{code:04X}"
        # fillers are letters, and variation selectors marks, by Unicode's own categories
        drawn = kind[0] in "LMNPS" and "FILLER" not in (name := unicodedata.name(text, "")) and "VARIATION" not in name
        if drawn and code not in (0x034F, 0x17B4, 0x17B5, 0x2800):
            assert is_visible(text), f"U+{code:04X} {name}"
    for word in ("خ", "नमस्ते", "北京", "🙂", "👨\u200d👩", "a\u0000", "\ue000", "\u0378"):
        assert is_visible(word)
    for blank in (
        "",
        " \t\n",
        "\u200b",
        "\u2060\ufeff",
        "\u3164",
        "\u115f\u1160\uffa0",
        "\u2800",
        "\U000e0041",
        "\ud800",
    ):
        assert not is_visible(blank)


def test_halves_of_surrogate_pairs_are_taken_as_white_space():
    assert normalise("a\ud800b") == "a b" and normalise("\udc00") == ""
