"""Splits by query: near-identical queries stay together, given test splits stay whole, draws are stable."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.sources.query_splits import (
    NearQueries,
    assign_splits,
    fold,
    near_identical,
    shuffled,
    split_name,
)


def together(*queries: str) -> bool:
    return len(set(near_identical({str(i): q for i, q in enumerate(queries)}).values())) == 1


def test_rewordings_are_near_identical():
    assert together("Red shoes", "shoes  RED", "red, shoe!", "ｒｅｄ shoes")
    assert together("spider man 2022", "2022 spiderman", "spiderman 2022")
    assert together("café in rome", "CAFE IN ROME")
    assert together("resident evil", "resident evl", "residnet evil", "residemt evil")
    assert together("a1", "b1", "c") is False


def test_short_queries_are_not_taken_for_typos_of_each_other():
    assert not together("cat", "bat")
    assert not together("iron man", "iron mat")  # seven letters
    assert together("iron mann 2", "iron man 2")


def test_consecutive_part_numbers_are_different_queries():
    """Seen: of 3,000 consecutive numbers, a tenth of them test queries, every train query left as a typo of another."""
    numbers = {f"q{i}": str(40_000_000 + i) for i in range(300)}
    assert len(set(near_identical(numbers).values())) == 300
    splits = {query_id: {"test" if i % 10 == 0 else "train"} for i, query_id in enumerate(numbers)}
    found = assign_splits(numbers, splits, dev_fraction=0.1, test_fraction=0.1, seed=0)
    assert not found.removed and Counter(found.split.values()) == {"train": 243, "test": 30, "dev": 27}
    for one, other in (("AB-100234", "AB-100235"), ("4711 0815", "4711 0816"), ("lego 76119", "lego 76118")):
        assert not together(one, other)
    assert together("AB-100234", "ab 100234", "AB100234") and together("bearing 100234", "baering 100234")
    assert together("tmnt 2012", "tmnt 2013")  # a year is no part number


def test_a_long_text_costs_no_more_than_a_question():
    """Seen: a query of 40,000 characters took 400 MB, since all its texts with a letter less were kept."""
    text = "a question of some length, " * 2000
    assert len(NearQueries([text]).keys) == 2
    assert text.upper() in NearQueries([text])
    question = "which lamp is bright enough to read by without waking those who sleep beside it"
    assert question.replace("bright", "brigth") in NearQueries([question])


def test_letters_and_digits_of_one_query_in_two_spellings():
    assert together("مستشفى", "مستشفي") and together("محـمد", "محمد")
    assert together("آيفون ١٥", "ايفون 15") and together("५ लीटर", "5 लीटर")
    assert together("stra\u00adße 9", "strasse 9") and together("İzmir", "izmir")


def test_queries_without_letters_are_told_apart():
    assert fold("???") == ["???"]
    assert not together("???", "!!!")


def words(n: int) -> dict[str, str]:
    names = ("amber", "birch", "cedar", "daisy", "elder", "fjord", "grove", "hazel", "ivory", "jolly")
    return {f"q{i}": f"{names[i % 10]} {names[i // 10 % 10]} {'x' * (i // 100 % 10)}" for i in range(n)}


def test_missing_splits_are_carved_in_the_asked_shares():
    queries = {f"q{i}": chr(0x4E00 + 7 * i) for i in range(1000)}
    unsplit: dict[str, set[str]] = {query_id: set() for query_id in queries}
    found = assign_splits(queries, unsplit, dev_fraction=0.1, test_fraction=0.2, seed=0)
    counts = {name: list(found.split.values()).count(name) for name in ("train", "dev", "test")}
    assert counts == {"train": 720, "dev": 80, "test": 200}
    assert not found.removed
    other = assign_splits(queries, unsplit, dev_fraction=0.1, test_fraction=0.2, seed=1)
    assert other.split != found.split


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 4), (1, 1, 400), (60, 50, 40, 70)])
def test_each_split_gets_a_group_where_there_are_three(sizes):
    """Seen: of three queries none was dev; where chains of part numbers made large groups, dev and test were empty."""
    names = ("amberstone", "birchwood", "cedarhill", "daisyfield")
    queries = {f"{name}{i}": name + " " + name[0] * i for name, size in zip(names, sizes) for i in range(size)}
    assert sorted(Counter(near_identical(queries).values()).values()) == sorted(sizes)
    for seed in range(5):
        found = assign_splits(queries, {q: set() for q in queries}, dev_fraction=0.1, test_fraction=0.1, seed=seed)
        counts = Counter(found.split.values())
        assert counts["train"] and counts["dev"] and counts["test"] and counts["train"] >= max(counts.values()) / 2
        given_test = {q: {"test"} if q.startswith("amberstone") else {"train"} for q in queries}
        found = assign_splits(queries, given_test, dev_fraction=0.1, test_fraction=0.1, seed=seed)
        assert set(found.split.values()) == {"train", "dev", "test"}


def test_two_queries_are_train_and_dev():
    unsplit: dict[str, set[str]] = {"a": set(), "b": set()}
    found = assign_splits({"a": "red", "b": "blue"}, unsplit, dev_fraction=0.5, test_fraction=0.5, seed=0)
    assert set(found.split.values()) == {"train", "dev"}


def test_a_given_test_split_stays_and_its_near_identical_train_queries_leave():
    queries = {"a": "red shoes", "b": "shoes red", "c": "blue hat", "d": "green coat", "e": "grey scarf"}
    given_splits = {"a": {"train"}, "b": {"test"}, "c": {"train", "test"}, "d": {"train"}, "e": {"dev"}}
    found = assign_splits(queries, given_splits, dev_fraction=0.5, test_fraction=0.5, seed=0)
    assert found.split == {"b": "test", "c": "test", "d": "train", "e": "dev"}
    assert found.removed == ["a"]


@given(st.lists(st.text("abc ", min_size=1, max_size=12), min_size=1, max_size=40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_no_group_ever_straddles(texts, seed):
    queries = {str(i): text for i, text in enumerate(texts)}
    given_splits = {q: [set(), {"train"}, {"test"}, {"train", "dev"}][int(q) % 4] for q in queries}
    found = assign_splits(queries, given_splits, dev_fraction=0.2, test_fraction=0.2, seed=seed)
    groups = near_identical(queries)
    splits_of_group: dict[str, set[str]] = {}
    for query_id, split in found.split.items():
        splits_of_group.setdefault(groups[query_id], set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of_group.values())
    assert set(found.split) | set(found.removed) == set(queries)
    assert all(found.split[q] == "test" for q in queries if given_splits[q] == {"test"})


def test_a_new_query_moves_no_other():
    order = shuffled(["a", "b", "c", "d"], 3)
    assert [q for q in shuffled(["a", "b", "c", "d", "e"], 3) if q != "e"] == order


def test_the_usual_names_of_splits_are_known():
    assert [split_name(n) for n in ("Train", "validation", "valid", "dev", "test", "foo")] == [
        "train", "dev", "dev", "dev", "test", None,
    ]  # fmt: skip


def test_marks_that_are_letters_keep_queries_apart():
    assert not together("काल", "कील") and not together("कला", "किला")
    assert not together("ハハ", "パパ") and not together("ババ", "パパ")
    assert together("パパ", "ﾊﾟﾊﾟ")
    assert fold("हिन्दी किताब") == ["हिन्दी", "किताब"]
    assert not together("c++", "c#") and not together("c++", "c")
    assert together("learn C++", "c++, learn!")
    assert together("red+blue", "red blue", "red + blue") and together("samsung s21+", "samsung s21")


def test_accents_and_vowel_points_make_no_other_query():
    assert together("crème brûlée", "creme brulee")
    assert together("Ελλάδα", "ελλαδα") and together("ёлка", "елка")
    assert together("كِتَاب", "كتاب") and together("أحمد", "احمد") and together("שָׁלוֹם", "שלום")
