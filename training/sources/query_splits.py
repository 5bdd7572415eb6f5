"""Splits by query, such that near-identical queries never stand on both sides: a reworded test query is a leak.

Two queries are near-identical when, folded (NFKC, case, accents, vowel points, punctuation, plural s), they have the
same words in any order, the same letters whatever the spaces, or, from MIN_TYPO_LENGTH letters on, differ by a typo or
two (a letter dropped in one of them or in both, so a wrong or swapped letter counts as well). Another digit of a part
number is another part, so there digits are no typos; nor are any in texts of more than MAX_TYPO_LENGTH letters.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ranking.spelling import fold_spelling

SPLITS = ("train", "dev", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "development", "valid", "validation", "val"), "dev"),
    **dict.fromkeys(("test", "eval"), "test"),
}
MIN_TYPO_LENGTH = 8
MAX_TYPO_LENGTH = 500  # a query has a key for each letter: of a whole document's letters, they would fill the memory
CODE_DIGITS = 5  # a word with so many is a number or a code; years, sizes and names of models have fewer

# What a searcher may leave out: accents of Latin, Greek and Cyrillic letters, vowel points of Hebrew and Arabic. Marks
# of other scripts are letters: without vowel signs or dakuten, words of Hindi or kana that mean other things are one
_ACCENTS = re.compile(
    "[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\u0591-\u05bd\u05bf\u05c1-\u05c7\u064b-\u065f\u0670]"
)
_SIGNS = "".join(chr(code) for code in range(0x0300, 0xABFF) if unicodedata.category(chr(code))[0] == "M")
_WORDS = re.compile(rf"(?:\w[{_SIGNS}]*)+(?:(?<=[^\W\d_])[+#]+(?![\w+#]))?")  # c++ and c# are words


def split_name(name: str) -> str | None:
    """train, dev or test for the usual names of splits; None for any other name."""
    return SPLIT_NAMES.get(name.strip().lower())


def fold(query: str) -> list[str]:
    """The words of a query without case, accents, punctuation and plural s; the raw text where that leaves nothing."""
    text = unicodedata.normalize("NFKD", fold_spelling(query))
    text = unicodedata.normalize("NFC", _ACCENTS.sub("", text))
    words = [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in _WORDS.findall(text)]
    return words or [query.strip()]


def _keys(query: str) -> Iterator[str]:
    words = fold(query)
    yield "words " + " ".join(sorted(set(words)))
    letters = "".join(words)
    yield "letters " + letters
    if MIN_TYPO_LENGTH <= len(letters) <= MAX_TYPO_LENGTH:
        # consecutive part numbers are a letter apart: taken for typos, a whole catalogue of them is one query
        code = letters.isdecimal() or any(sum(map(str.isdecimal, word)) >= CODE_DIGITS for word in words)
        may_differ = [i for i, letter in enumerate(letters) if not (code and letter.isdecimal())]
        yield from {"letters " + letters[:i] + letters[i + 1 :] for i in may_differ}


def near_identical(queries: Mapping[str, str]) -> dict[str, str]:
    """query id -> name of its group, the smallest id in it. queries: id -> text.

    Memory is about 3 kB a query, 70 kB at most.
    """
    parent = {query_id: query_id for query_id in queries}

    def root(node: str) -> str:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    first_with: dict[int, str] = {}
    for query_id, text in queries.items():
        for key in _keys(text):
            a, b = root(first_with.setdefault(hash(key), query_id)), root(query_id)
            if a != b:
                parent[max(a, b)] = min(a, b)
    return {query_id: root(query_id) for query_id in queries}


class NearQueries:
    """Tells which queries are near-identical to one of a few given ones.

    Memory is about 3 kB a given query, 70 kB at most.
    """

    def __init__(self, queries: Iterable[str]):
        self.keys = {hash(key) for query in queries for key in _keys(query)}

    def __contains__(self, query: str) -> bool:
        return bool(self.keys) and any(hash(key) in self.keys for key in _keys(query))


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """Names in an order that depends on each name and the seed alone: adding a query moves no other."""
    return sorted(names, key=lambda name: (hashlib.blake2b(f"{seed}\t{name}".encode(), digest_size=8).digest(), name))


@dataclass
class QuerySplits:
    """split: query id -> train, dev or test; groups: how many near-identical ones; removed: ids on both sides."""

    split: dict[str, str]
    groups: int
    largest_group: int
    removed: list[str]


def assign_splits(
    queries: Mapping[str, str],
    given: Mapping[str, set[str]],
    *,
    dev_fraction: float,
    test_fraction: float,
    seed: int,
) -> QuerySplits:
    """Give every query one split. queries: id -> text; given: id -> the splits it has in the source (empty: none).

    A given test or dev split stays as it is, so that figures remain comparable; whatever near-identical query stands in
    a lower split (train under dev under test) is removed and listed. A split that nobody has is carved out of train, or
    out of the queries without a split, in whole groups. Where all queries are test queries there is nothing to carve.
    """
    group_of = near_identical(queries)
    members: dict[str, list[str]] = {}
    for query_id, group in group_of.items():
        members.setdefault(group, []).append(query_id)
    rank = {name: i for i, name in enumerate(SPLITS)}
    split = {query_id: max(given[query_id], key=lambda s: rank[s], default="train") for query_id in queries}
    have = {name for names in given.values() for name in names}
    lacking = [(n, fraction) for n, fraction in (("test", test_fraction), ("dev", dev_fraction)) if n not in have]
    for done, (name, fraction) in enumerate(lacking):
        _carve(split, members, name, fraction, seed, leave=len(lacking) - done)
    removed = []
    for ids in members.values():
        top = max((split[query_id] for query_id in ids), key=lambda s: rank[s])
        removed += [query_id for query_id in ids if split[query_id] != top]
    for query_id in removed:
        del split[query_id]
    return QuerySplits(split, len(members), max(map(len, members.values()), default=0), sorted(removed))


def _carve(
    split: dict[str, str], members: Mapping[str, list[str]], name: str, fraction: float, seed: int, leave: int
) -> None:
    """Move whole groups of train queries to split `name`, in shuffled order, until fraction of train is reached.

    leave: groups that the other splits need, one each. Where more are there at least one is moved, one of the smallest
    if none is as small as the fraction: a small collection needs every split, too.
    """
    free = [group for group, ids in members.items() if all(split[query_id] == "train" for query_id in ids)]
    spare = len(free) - leave
    if spare <= 0:
        return
    queries, smallest = sum(len(members[group]) for group in free), min(len(members[group]) for group in free)
    wanted = max(round(fraction * queries), smallest)
    for group in shuffled(free, seed):
        if spare and len(members[group]) <= wanted:  # a larger group is left for a split with room for it
            wanted, spare = wanted - len(members[group]), spare - 1
            split.update(dict.fromkeys(members[group], name))
