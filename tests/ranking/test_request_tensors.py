"""The request's tensors: names, shapes and bytes; what of an answer is refused."""

from __future__ import annotations

import numpy as np
import pytest

from ranking.request_tensors import descending, documents_of, read_scores, request_tensors, token_tensors


def test_the_three_inputs_have_their_names_shapes_and_utf8_bytes():
    tensors = request_tensors("a\ud800b", ["ü", "x"], ["", "y"])
    assert {name: values.shape for name, values in tensors.items()} == {"query": (1,), "title": (2,), "summary": (2,)}
    assert all(values.dtype == np.object_ for values in tensors.values())
    assert tensors["query"][0] == b"a?b" and tensors["title"][0].decode() == "ü"


def test_a_page_without_documents_has_empty_tensors():
    assert request_tensors("q", [], [])["title"].shape == (0,)


def test_priors_are_sent_where_a_document_has_one():
    tensors = request_tensors("q", ["a", "b"], ["", ""], [2, None])
    assert tensors["prior"].dtype == np.float32 and tensors["prior"][0] == 2 and np.isnan(tensors["prior"][1])
    assert "prior" not in request_tensors("q", ["a", "b"], ["", ""], [None, None])
    with pytest.raises(ValueError, match="2 titles and 1 priors"):
        request_tensors("q", ["a", "b"], ["", ""], [1.0])
    for bad in (float("nan"), float("inf"), 1e31):
        with pytest.raises(ValueError, match="a finite number"):
            request_tensors("q", ["a"], [""], [bad])


def test_titles_and_summaries_must_be_as_many():
    with pytest.raises(ValueError, match="2 titles and 1 summaries"):
        request_tensors("q", ["a", "b"], ["c"])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (None, "no tensor `score`"),
        (np.zeros(3, np.float32), r"scores of shape \[3\] for 2 documents"),
        (np.zeros((2, 1), np.float32), r"shape \[2, 1\]"),
        (np.zeros(2, np.int32), "int32 scores"),
        (np.array([1.0, np.nan], np.float32), "NaN"),
        (np.array([1.0, -np.inf], np.float32), "NaN or infinite"),
    ],
)
def test_an_unusable_score_tensor_is_refused_with_the_reason(values, reason):
    with pytest.raises(ValueError, match=reason):
        read_scores(values, 2)


def test_equal_scores_keep_the_order_of_the_documents():
    assert descending(np.array([1.0, 2.0, 1.0, 2.0], np.float32)).tolist() == [1, 3, 0, 2]


def test_token_ids_go_field_after_field():
    tensors = token_tensors([1, 2], [[3], []], [[4, 5], [6]], "0a")
    assert tensors["token_ids"].tolist() == [1, 2, 3, 4, 5, 6] and tensors["token_counts"].tolist() == [2, 1, 2, 0, 1]
    assert tensors["token_ids"].dtype == tensors["token_counts"].dtype == np.int32
    assert tensors["vocabulary"].tolist() == [b"0a"] and documents_of(tensors) == 2
    assert documents_of(request_tensors("q", ["a"], [""])) == 1
    with pytest.raises(ValueError, match="1 titles and 0 summaries"):
        token_tensors([1], [[3]], [], "0a")
