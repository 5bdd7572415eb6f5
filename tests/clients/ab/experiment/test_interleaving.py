"""Team draft: a fair page from two rankings."""

from __future__ import annotations

import random

import pytest

from clients.ab.experiment.interleaving import AGREED, team_draft


def rankings(n: int, seed: int) -> tuple[list[int], list[int]]:
    rng = random.Random(seed)
    return rng.sample(range(n), n), rng.sample(range(n), n)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 47])
def test_every_document_once_and_teams_of_equal_size(n):
    for seed in range(50):
        first, second = rankings(n, seed)
        order, teams = team_draft(first, second, f"page-{seed}")
        assert sorted(order) == list(range(n))
        assert teams.count(0) == teams.count(1)
        _, plain = team_draft(first, second, f"page-{seed}", credit_agreed=True)
        assert abs(plain.count(0) - plain.count(1)) <= n % 2 and AGREED not in plain


def test_each_team_takes_its_best_document_that_is_left():
    first, second = rankings(12, 3)
    order, teams = team_draft(first, second, "page")
    for place, (document, team) in enumerate(zip(order, teams)):
        left = [[d for d in ranking if d not in order[:place]] for ranking in (first, second)]
        assert document == left[max(team, 0)][0]
        if team == AGREED:
            assert left[0][0] == left[1][0]


def test_within_every_round_each_team_has_one_turn():
    _, teams = team_draft(*rankings(20, 1), "page")
    turns = [team for team in teams if team != AGREED]
    assert turns and all({turns[i], turns[i + 1]} == {0, 1} for i in range(0, len(turns), 2))


def test_what_both_rankings_agree_on_is_nobodys():
    same = list(range(8))
    assert team_draft(same, same, "page") == (same, [AGREED] * 8)
    order, teams = team_draft([0, 1, 2, 3], [0, 2, 1, 3], "page")
    assert (order[0], order[3]) == (0, 3) and teams[0] == teams[3] == AGREED
    assert {order[1], order[2]} == {1, 2} and {teams[1], teams[2]} == {0, 1}


def test_the_same_page_can_be_made_again_and_others_differ():
    first, second = rankings(10, 5)
    assert team_draft(first, second, "a") == team_draft(first, second, "a")
    assert len({tuple(team_draft(first, second, f"p{i}")[1]) for i in range(50)}) > 10


def test_neither_team_is_favoured_for_the_first_place():
    pages = [team_draft([0, 1, 2], [2, 1, 0], f"page-{i}") for i in range(4000)]
    firsts = sum(teams[0] == 0 for _, teams in pages)
    assert 1850 < firsts < 2150
    assert all((order[0] == 0) == (teams[0] == 0) for order, teams in pages)


def test_different_documents_are_refused():
    with pytest.raises(ValueError, match="permutations"):
        team_draft([0, 1], [0, 2], "x")
