"""Length buckets: every row once, in a bucket that holds it, at the least cost."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from serving.front.buckets import cut, fill

EDGES = [16, 32, 48, 64]
lengths_of_pairs = st.lists(st.integers(1, 64), max_size=40)


@given(lengths_of_pairs, st.integers(1, 20), st.integers(16, 2000), st.integers(0, 500))
def test_every_row_is_in_one_bucket_that_holds_it_and_keeps_the_limits(lengths, max_batch, batch_tokens, call_tokens):
    buckets = cut(lengths, EDGES, max_batch, batch_tokens, call_tokens)
    assert sorted(row for bucket in buckets for row in bucket.rows) == list(range(len(lengths)))
    for bucket in buckets:
        assert bucket.length in EDGES and all(lengths[row] <= bucket.length for row in bucket.rows)
        assert len(bucket.rows) <= max_batch
        assert len(bucket.rows) == 1 or len(bucket.rows) * bucket.length <= batch_tokens


@given(lengths_of_pairs.filter(bool), st.integers(0, 300))
def test_no_choice_of_edges_costs_less(lengths, call_tokens):
    def cost(edges: tuple[int, ...]) -> int:
        padded = [next(edge for edge in edges if edge >= n) for n in lengths]
        return sum(padded) + call_tokens * len(set(padded))

    buckets = cut(lengths, EDGES, 10**6, 10**9, call_tokens)
    found = sum(len(b.rows) * b.length + call_tokens for b in buckets)
    choices = itertools.chain.from_iterable(itertools.combinations(EDGES[:-1], n) for n in range(4))
    assert found <= min(cost((*choice, EDGES[-1])) for choice in choices)


def test_short_pairs_do_not_pay_for_a_long_one():
    buckets = cut([10] * 47 + [64], EDGES, 64, 4096, call_tokens=64)
    assert [(len(b.rows), b.length) for b in buckets] == [(47, 16), (1, 64)]


def test_one_call_is_kept_where_splitting_saves_less_than_a_call_costs():
    assert [b.length for b in cut([16, 17, 32], EDGES, 64, 4096, call_tokens=64)] == [32]


@given(lengths_of_pairs, st.integers(1, 20), st.integers(16, 2000))
def test_packed_calls_hold_every_row_in_order_within_the_limits(lengths, max_batch, batch_tokens):
    calls = fill(lengths, max_batch, batch_tokens)
    assert [row for rows in calls for row in rows] == list(range(len(lengths)))
    for rows in calls:
        assert len(rows) <= max_batch
        assert len(rows) == 1 or sum(lengths[row] for row in rows) <= batch_tokens
    for rows, later in itertools.pairwise(calls):  # no call could have taken the next row
        tokens = sum(lengths[row] for row in rows)
        assert len(rows) == max_batch or tokens + lengths[later[0]] > batch_tokens
