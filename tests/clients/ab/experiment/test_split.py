"""Assignment to arms: agreement with GrowthBook, uniformity, independence, stickiness, refusals."""

from __future__ import annotations

import itertools
import random

import growthbook.core as oracle
import numpy as np
import pytest
from growthbook import GrowthBook
from growthbook.common_types import Experiment
from scipy.stats import chi2, chisquare

from clients.ab.experiment.split import Assignment, Namespace, Split, assign, bucket, fnv1a, namespace_bucket

ALPHABETS = ("0123456789", "abcdefXYZ-_.@ ", "äßé", "用户检索", "😀🚀🧑‍🔬𝒳", "\ud83d\ude00\ud800", "\u0000\uffff\u202e")


def random_ids(count: int, seed: int = 0) -> list[str]:
    """Ids of mixed alphabets, 1 to 24 characters: ASCII, accents, Chinese, surrogate pairs, lone surrogates."""
    rng = random.Random(seed)
    return ["".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randint(1, 24))) for _ in range(count)]


def test_bucket_agrees_with_growthbook_on_10000_random_ids_and_seeds():
    ids, seeds = random_ids(10_000), random_ids(10_000, seed=1)
    for user_id, seed in zip(ids, seeds):
        assert bucket(seed, user_id) == oracle.gbhash(seed, user_id, 2)
        assert namespace_bucket(seed, user_id) == oracle.gbhash("__" + seed, user_id, 1)


def test_published_vectors():
    # hash version 2 in GrowthBook's cases.json, and FNV's own reference vectors
    published = {("seed", "a"): 0.0505, ("seed", "b"): 0.2696, ("foo", "ab"): 0.2575, ("foo", "def"): 0.2019}
    assert {key: bucket(*key) for key in published} == published
    assert fnv1a("") == 0x811C9DC5 and fnv1a("a") == 0xE40C292C


def test_code_units_not_utf8_bytes():
    # under UTF-8 these would be other numbers, and no published vector catches it
    assert fnv1a("用户1") == oracle.fnv1a32("用户1")
    utf8 = 0x811C9DC5
    for byte in "用户1".encode():
        utf8 = (utf8 ^ byte) * 0x01000193 & 0xFFFFFFFF
    assert fnv1a("用户1") != utf8
    assert fnv1a("😀") == fnv1a("\ud83d\ude00")


def test_assignment_agrees_with_the_growthbook_sdk_on_weights_coverage_and_namespaces():
    rng = random.Random(7)
    ids = random_ids(10_000, seed=2)
    outside = 0
    for block in range(0, len(ids), 50):
        count = rng.randint(2, 5)
        raw = [rng.random() for _ in range(count)]
        weights = rng.choice([None, [w / sum(raw) for w in raw], [0.995 * w / sum(raw) for w in raw]])
        coverage = rng.choice([1.0, rng.random(), 0.0])
        low = rng.random() * 0.8
        namespace = rng.choice([None, (rng.choice(["ranking", "排序"]), low, low + 0.2)])
        seed = rng.choice(["", "seed", "种子🚀"])
        split = Split(
            "key", [str(i) for i in range(count)], weights, seed, coverage, Namespace(*namespace) if namespace else None
        )
        theirs = Experiment(
            "key", list(range(count)), weights=weights, coverage=coverage, namespace=namespace, seed=seed, hashVersion=2
        )
        for user_id in ids[block : block + 50]:
            with_sdk = GrowthBook(attributes={"id": user_id})
            result = with_sdk.run(theirs)
            expected = str(result.value) if result.inExperiment else None
            assert split.assign(user_id) == expected
            outside += expected is None
    assert 1000 < outside < 9000  # both outcomes were really compared


@pytest.mark.parametrize("pattern", ["{}", "user-{:08d}", "{:032x}", "用户{}", "{}@example.org"])
def test_uniform_over_sequential_ids_for_many_seeds(pattern):
    # 20 buckets, 20 seeds: under uniformity the p values are uniform themselves; a bad hash gives p near 0 at once
    ids = [pattern.format(i) for i in range(4000)]
    ps = []
    for seed in range(20):
        places = (np.array([bucket(f"seed-{seed}", i) for i in ids]) * 20).astype(int)
        ps.append(chisquare(np.bincount(places, minlength=20)).pvalue)
    fisher = chi2.sf(-2 * np.log(np.maximum(ps, 1e-300)).sum(), 2 * len(ps))
    assert fisher > 1e-4 and min(ps) > 1e-4


def independence(place, seeds: list[str]) -> list[float]:
    """Chi-square p of the 8 x 8 table of places of sequential ids, for every pair of seeds."""
    places = {seed: (np.array([place(seed, f"user-{i:06d}") for i in range(4000)]) * 8).astype(int) for seed in seeds}
    ps = []
    for a, b in itertools.combinations(seeds, 2):
        table = np.zeros((8, 8))
        np.add.at(table, (places[a], places[b]), 1)
        expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
        ps.append(float(chi2.sf(((table - expected) ** 2 / expected).sum(), 49)))
    return ps


def test_two_experiments_divide_users_independently():
    ps = independence(bucket, [f"exp-{n}" for n in range(8)])
    assert min(ps) > 1e-4
    assert 0.2 < np.mean(ps) < 0.8


def test_the_independence_test_has_teeth_hash_version_1_fails_it():
    # version 1 hashes the id before the seed, so experiments with like seeds divide like
    assert min(independence(lambda seed, i: oracle.gbhash(seed, i, 1), [f"exp-{n}" for n in range(8)])) < 1e-12


def test_namespace_membership_says_nothing_about_the_arm():
    split = Split("exp", ("a", "b"), namespace=Namespace("ranking", 0.0, 0.5))
    arms = [arm for i in range(20_000) if (arm := split.assign(f"user-{i}"))]
    assert chisquare([arms.count("a"), arms.count("b")]).pvalue > 1e-3


def test_disjoint_ranges_of_a_namespace_never_share_a_user():
    first = Split("first", ("a", "b"), namespace=Namespace("ranking", 0.0, 0.4))
    second = Split("second", ("a", "b"), namespace=Namespace("ranking", 0.4, 1.0))
    both = [(first.assign(i), second.assign(i)) for i in random_ids(3000)]
    assert all((x is None) != (y is None) for x, y in both)


def test_a_ramp_adds_users_and_moves_nobody():
    ids = random_ids(2000, seed=5)
    before: dict[str, str] = {}
    for coverage in (0.01, 0.1, 0.5, 1.0):
        split = Split("exp", ("a", "b", "c"), weights=(0.2, 0.3, 0.5), coverage=coverage)
        now = {i: arm for i in ids if (arm := split.assign(i))}
        assert before.items() <= now.items()
        before = now
    assert len(before) == len(set(ids))


def test_forced_users_come_before_coverage_and_are_marked():
    split = Split("exp", ("a", "b"), coverage=0.0, forced={"tester": "b"})
    assert assign([split], "tester") == Assignment("exp", "b", forced=True)
    assert assign([split], "somebody") == Assignment()


def test_the_first_experiment_that_takes_a_user_wins():
    half = Split("half", ("a", "b"), coverage=0.5)
    rest = Split("rest", ("a", "b"))
    names = [assign([half, rest], f"user-{i}").experiment for i in range(2000)]
    assert 900 < names.count("half") < 1100 and names.count("rest") == 2000 - names.count("half")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"arms": ()}, "one or more distinct"),
        ({"arms": ("a", "a")}, "one or more distinct"),
        ({"weights": (0.5,)}, "1 weights for 2 arms"),
        ({"weights": (0.5, 0.6)}, "sum to 1.1"),
        ({"weights": (1.5, -0.5)}, "not negative"),
        ({"weights": (float("nan"), 1.0)}, "finite"),
        ({"coverage": 1.2}, "outside 0 to 1"),
        ({"forced": {"u": "c"}}, "forced arm c"),
        ({"name": ""}, "name is empty"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        Split(**{"name": "exp", "arms": ("a", "b"), **wrong})


def test_an_empty_user_id_is_refused_not_put_into_one_arm():
    with pytest.raises(ValueError, match="user id is empty"):
        Split("exp", ("a", "b")).assign("")
