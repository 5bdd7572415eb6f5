"""Chunks of long summaries: where they begin and end, what a pair of one holds, and the score made of theirs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from ranking.chunks import Chunking, pool
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.text import PairFormat, StudentFormat
from ranking.text_figures import text_figures

LIMITS = FieldLimits(max_query_tokens=2, max_title_tokens=2, max_summary_tokens=4)


def text(**chunking) -> StudentFormat:
    """A format whose words w0, w1, ... are tokens of the ids 10, 11, ..."""
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3} | {f"w{number}": 10 + number for number in range(90)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return StudentFormat(tokenizer, LIMITS, Chunking(**chunking))


def words(first: int, end: int) -> str:
    return " ".join(f"w{number}" for number in range(first, end))


@given(st.integers(0, 400), st.integers(1, 60), st.integers(1, 20), st.data())
def test_chunks_cover_a_summary_in_order_with_the_overlap_and_no_chunk_for_nothing(tokens, size, most, data):
    overlap = data.draw(st.integers(0, size - 1))
    chunking = Chunking(most, overlap)
    spans = chunking.spans(min(tokens, chunking.summary_tokens(size)), size)
    assert spans[0][0] == 0 and 1 <= len(spans) <= most
    assert spans[-1][1] == min(tokens, size + (most - 1) * (size - overlap))
    assert all(end - start == size for start, end in spans[:-1])
    for (_, end), (start, next_end) in pairwise(spans):
        assert end - start == overlap and next_end > end


def test_every_chunk_is_a_pair_with_the_query_and_the_title_before_it():
    documents = text(most=3, overlap=1).encode_documents(
        ["w0 w1 w9"] * 4, ["w2", "w2", "", "w2"], ["", words(10, 14), words(10, 15), words(10, 99)]
    )
    query = [1, 10, 11, 2]
    assert documents.starts.tolist() == [0, 1, 2, 4, 7] and len(documents) == 4
    assert [pair.ids for pair in documents.pairs] == [
        [*query, 12, 2],
        [*query, 12, 20, 21, 22, 23, 2],
        [*query, 20, 21, 22, 23, 2],
        [*query, 23, 24, 2],
        [*query, 12, 20, 21, 22, 23, 2],
        [*query, 12, 23, 24, 25, 26, 2],
        [*query, 12, 26, 27, 28, 29, 2],
    ]
    assert {pair.document_start for pair in documents.pairs} == {4}


def test_one_chunk_is_the_text_that_was_always_read():
    whole, chunked = text(), text(most=3, overlap=1)
    rows = ["w0"] * 3, ["w1", "", "w2"], ["", words(10, 13), words(10, 40)]
    pairs = whole.encode(*rows)
    assert whole.encode_documents(*rows).pairs == pairs
    assert chunked.encode_documents(*rows, most_chunks=1).pairs == pairs
    first = chunked.encode_documents(*rows)
    assert [first.pairs[start] for start in first.starts[:-1]] == pairs
    assert chunked.max_tokens() == whole.max_tokens() == max(len(pair.ids) for pair in first.pairs) + 2
    with pytest.raises(InputError, match="up to 3 chunks are read"):
        chunked.encode(*rows)


@pytest.mark.parametrize("pooling, expected", [("max", [3.0, 5.0, -2.0]), ("mean", [3.0, 1.0, -4.0])])
def test_a_documents_score_is_made_of_its_own_chunks(pooling, expected):
    scores = np.array([3, 5, -4, 2, -2, -6], np.float32)
    pooled = pool(scores, np.array([0, 1, 4, 6]), pooling)
    assert pooled.dtype == np.float32 and pooled.tolist() == expected


def test_the_share_of_summaries_that_are_cut_counts_all_chunks():
    rows = ["w0"] * 4, ["w1"] * 4, [words(0, length) for length in (4, 5, 10, 11)]
    assert text_figures(text(), *rows).cut_summary == 0.75
    assert text_figures(text(most=3, overlap=1), *rows).cut_summary == 0.25


@pytest.mark.parametrize("marks", [("[PAD]", "[CLS]", "[SEP]", "[UNK]"), ("<pad>", "<s>", "</s>", "<unk>")])
def test_unknown_tokens_are_counted_whatever_the_vocabulary_calls_them(marks):
    """Seen: none was unknown to a student of XLM-R, so the watch never told of words that it could not read."""
    tokenizer = Tokenizer(WordLevel({mark: i for i, mark in enumerate(marks)} | {"w0": 4}, unk_token=marks[3]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    template = {"single": f"{marks[1]} $A {marks[2]}", "pair": f"{marks[1]} $A {marks[2]} $B {marks[2]}"}
    tokenizer.post_processor = TemplateProcessing(**template, special_tokens=[(marks[1], 1), (marks[2], 2)])
    assert text_figures(PairFormat(tokenizer, LIMITS), ["w0 x"], ["w0"], ["y"]).unknown == 0.5


@pytest.mark.parametrize(
    "chunking, reason",
    [
        ({"most": 0}, "most is 0"), ({"most": 2.0}, "most is 2.0"), ({"most": 257}, "most is 257"),
        ({"overlap": -1}, "overlap is -1"), ({"pooling": "first"}, "pooling is 'first'"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(chunking, reason):
    with pytest.raises(ValueError, match=reason):
        Chunking(**chunking)


def test_chunks_that_would_not_advance_are_refused():
    with pytest.raises(InputError, match=r"overlap is 4, a chunk .* has 4 tokens"):
        text(most=2, overlap=4)
