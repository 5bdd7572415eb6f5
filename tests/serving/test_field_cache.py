"""The front's cache of tokenised fields gives what the tokenizer gives, keeps to its size, and counts."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serving.front.field_cache import LONGEST_KEPT, FieldCache, entry_bytes

fields = st.lists(st.text("abc", max_size=3), max_size=6)


def tokenise(texts, limit):
    return [[ord(letter) for letter in text][:limit] for text in texts]


def listed(found):
    assert all(ids.dtype == np.int32 for ids in found)
    return [ids.tolist() for ids in found]


@given(st.lists(st.tuples(fields, st.integers(1, 3)), max_size=12), st.integers(0, 4))
def test_whatever_was_asked_before_the_ids_are_the_tokenizers(requests, capacity):
    cache = FieldCache(tokenise, capacity)
    for texts, limit in requests:
        assert listed(cache(texts, limit)) == tokenise(texts, limit)
        assert len(cache) <= capacity
        assert cache.bytes == sum(entry_bytes(text, ids) for (_, text), ids in cache._ids.items())
    assert cache.hits + cache.misses == sum(len(set(texts)) for texts, _ in requests)


def test_the_least_recently_used_field_goes_first():
    asked = []
    cache = FieldCache(lambda texts, limit: asked.extend(texts) or tokenise(texts, limit), capacity=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        cache([text], 8)
    assert asked == ["a", "b", "c", "b"] and (cache.hits, cache.misses) == (2, 4)


def test_a_field_is_kept_for_each_limit_and_never_when_it_is_long():
    cache = FieldCache(tokenise, capacity=10)
    assert listed(cache(["abc"], 1)) == [[97]] and listed(cache(["abc"], 2)) == [[97, 98]]
    cache(["x" * (LONGEST_KEPT + 1)], 4)
    assert (cache.hits, len(cache)) == (0, 2)
