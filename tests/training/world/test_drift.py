"""The drift of the built-in world: who is searched from when, and which words change meaning."""

from __future__ import annotations

import random

import numpy as np
import pytest

from training.world.dataset import WorldConfig, make_world
from training.world.drift import DriftSettings, candidates_of, corpus_of_round, draw_drift
from training.world.lexicon import load_lexicon
from training.world.queries import draw_query

SETTINGS = DriftSettings(new_intents=0.2, moved_meanings=0.3)


@pytest.fixture(scope="module")
def world():
    return make_world(WorldConfig.small(drift=SETTINGS))


def drift_of(seed: int):
    return draw_drift(load_lexicon(), SETTINGS, np.random.default_rng(seed))


def test_the_same_heads_drift_for_the_same_seed_in_their_share_of_every_domain():
    lexicon, drift = load_lexicon(), drift_of(1)
    assert drift == drift_of(1) and drift != drift_of(2)
    moved = [head for _, *pair in drift.moved for head in pair]
    assert len(set(moved)) == len(moved) and not set(moved) & set(drift.arrival)
    for domain in lexicon.domains:
        heads = {concept.number for concept in domain.heads}
        assert len(heads & set(drift.arrival)) == round(0.2 * len(heads))
        assert len(heads & set(moved)) == 2 * round(0.15 * len(heads))
    assert {when for when, *_ in drift.moved} == set(drift.arrival.values()) == {2, 3, 4}


def test_two_heads_exchange_their_searchers_words_from_their_round_on_and_keep_the_documents_own():
    lexicon, drift = load_lexicon(), drift_of(1)
    when, head, other = drift.moved[0]
    assert drift.lexicon(lexicon, when - 1).concepts[head] == lexicon.concepts[head]
    later = drift.lexicon(lexicon, when).concepts[head]
    assert later.typed == (lexicon.concepts[head].typed[0], *lexicon.concepts[other].typed[1:])
    assert later.documents == lexicon.concepts[head].documents
    assert drift.lexicon(lexicon, 0) == lexicon


def test_nobody_searches_for_what_is_to_come_before_the_world_drifts(world):
    drawn = [*(query for queries in world.judged.values() for query in queries), *world.unlabelled, *world.logged]
    assert world.drift.arrival and not {query.head for query in drawn} & set(world.drift.arrival)


def test_a_moved_word_asks_for_other_documents_and_an_unmoved_one_for_the_same(world):
    luck = random.Random(1)
    before, after = (corpus_of_round(world.corpus, world.drift, number) for number in (1, 4))
    moved = world.drift.exchanged(4)
    seen = {"moved": 0, "same": 0}
    for _ in range(300):
        query = draw_query(world.corpus, 0.3, set(), luck, judged=False)
        again = query.typed_with(after.lexicon)
        if query.head in moved and query.forms[0][1]:
            meant = query.text.replace(world.lexicon.concepts[query.head].typed[query.forms[0][1]], "")
            assert again.text != query.text and again.head == query.head
            assert all(word in again.text.split() for word in meant.split())  # its other words stay
            seen["moved"] += 1
        elif query.head not in moved:
            assert again == query
            rows = [candidates_of(corpus, query, 12, seed=1) for corpus in (before, after)]
            assert rows[0] == rows[1]
            seen["same"] += 1
    assert min(seen.values()) > 20


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="new_intents is 2"):
        DriftSettings(new_intents=2)
    with pytest.raises(ValueError, match="more than 1"):
        DriftSettings(new_intents=0.6, moved_meanings=0.6)
    with pytest.raises(ValueError, match="first <= last"):
        DriftSettings(first_round=3, last_round=2)
