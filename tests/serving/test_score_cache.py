"""The front's cache of scores gives what was kept, to the bit, and keeps to its size, its age and its audit."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serving.front.score_cache import AUDIT_EVERY, ENTRY_BYTES, ScoreCache, content_keys

documents = st.lists(st.tuples(st.binary(max_size=3), st.binary(max_size=3)), max_size=8)


def keys_of(names: str) -> list[bytes]:
    return content_keys(b"query", [(name.encode(), b"") for name in names], b"text")


def keep(cache: ScoreCache, keys: list[bytes], scores) -> None:
    cache.keep(keys, scores, np.full(len(keys), 3, np.int32))


def scores_of(cache: ScoreCache, keys: list[bytes]):
    """What is found; each with the chunks that it was kept with."""
    scores, chunks = cache.find(keys)
    assert chunks.tolist() == np.where(np.isnan(scores), 0, 3).tolist()
    return scores


@given(st.binary(max_size=3), documents, st.binary(max_size=3), documents)
def test_contents_have_one_key_only_if_they_are_equal(query, listed, other_query, other_listed):
    kept = dict(zip(content_keys(query, listed, b"text"), listed))
    for key, document in zip(content_keys(other_query, other_listed, b"text"), other_listed):
        assert (key in kept) == (query == other_query and document in listed)
    assert not set(kept) & set(content_keys(query, listed, b"tokens"))


@given(st.lists(st.tuples(st.text("abcdef", max_size=5), st.floats(width=32)), max_size=20), st.integers(0, 4))
def test_what_is_found_is_what_was_kept_last_and_no_more_than_the_size(kept, capacity):
    cache = ScoreCache(capacity * ENTRY_BYTES, 1e9)
    last: dict[bytes, np.float32] = {}
    for names, score in kept:
        keys = keys_of(names)
        keep(cache, keys, np.full(len(keys), score, np.float32))
        last |= dict.fromkeys(keys, np.float32(score)) if np.isfinite(np.float32(score)) else {}
        assert len(cache) <= capacity and cache.used_bytes <= capacity * ENTRY_BYTES
    for key in keys_of("abcdef"):
        (found,) = scores_of(cache, [key])
        assert np.isnan(found) or found.tobytes() == last[key].tobytes()
    assert cache.hits + cache.misses == 6 and cache.hits == min(capacity, len(last))


def test_the_least_recently_used_score_goes_first():
    cache = ScoreCache(2 * ENTRY_BYTES, 1e9)
    for name in "ab":
        keep(cache, keys_of(name), np.float32([1]))
    scores_of(cache, keys_of("a"))
    keep(cache, keys_of("c"), np.float32([2]))
    assert np.isnan(scores_of(cache, keys_of("abc"))).tolist() == [False, True, False]


def test_a_score_is_not_given_when_it_is_too_old():
    now = 0.0
    cache = ScoreCache(10 * ENTRY_BYTES, 60, clock=lambda: now)
    keep(cache, keys_of("a"), np.float32([1]))
    now = 60.0
    assert scores_of(cache, keys_of("a")) == [1]
    now = 60.5
    assert np.isnan(scores_of(cache, keys_of("a"))).all() and len(cache) == 0


def test_one_audit_in_so_many_lookups_with_a_hit_and_a_moved_score_ends_the_cache():
    cache = ScoreCache(10 * ENTRY_BYTES, 60)
    assert [cache.is_audit_due() for _ in range(2 * AUDIT_EVERY)].count(True) == cache.audits == 2
    keep(cache, keys_of("ab"), np.float32([1, 0.0]))
    found = scores_of(cache, keys_of("abc"))
    assert cache.compare(found, np.float32([1, 0.0, 7])) and cache.moved == 0
    assert not cache.compare(found, np.float32([1, -0.0, 7])) and cache.moved == 1  # a bit of a zero counts too
    keep(cache, keys_of("a"), np.float32([1]))
    assert np.isnan(scores_of(cache, keys_of("ab"))).all() and len(cache) == 0


def test_the_memory_of_a_full_cache_is_no_more_than_its_size():
    entries = 20_000
    tracemalloc.start()
    try:
        cache = ScoreCache(entries * ENTRY_BYTES, 60)
        for start in range(0, 2 * entries, 50):  # twice as many as it keeps
            keys = content_keys(b"query", [(str(number).encode(), b"") for number in range(start, start + 50)], b"text")
            keep(cache, keys, np.arange(start, start + 50, dtype=np.float32))
            del keys
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(cache) == entries and entries * ENTRY_BYTES / 3 < used <= entries * ENTRY_BYTES
