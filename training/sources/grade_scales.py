"""Maps the grades of a source to ours, 0 to 4: whole grades on that scale stay, any other scale is mapped by a rule.

A rule is an explicit map ("1,1.33=0,1.67,2=1,3=2") or by rank: the distinct values in ascending order become 0, 1, 2,
..., and where there are more than five of them they are spread evenly over 0 to 4. Without a rule, whole grades below 0
count as 0 (as trec_eval has it), and a source with at least STRAY_SHARE of its grades off our scale is taken to have a
scale of its own and is mapped by rank. Fewer are taken for errors, and refused row by row.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from ranking.errors import InputError
from ranking.schema import MAX_GRADE
from training.sources.judged_collections import JudgedSource
from training.sources.row_readers import BadRows, on_scale

LOGGER = logging.getLogger(__name__)
BY_RANK = "by-rank"
STRAY_SHARE = 0.05
MAX_NAMED = 30  # distinct values that a line can name
SAME_VALUE = 0.005  # "1.33" names 1.3333 too


def parse_grades(words: Sequence[str]) -> dict[float, int] | str:
    """["1", "1.33=0", "2=1"] -> {1: 0, 1.33: 0, 2: 1}; ["by-rank"] -> BY_RANK; [] -> "". ValueError names a bad word.

    A value without "=" has the grade of the next value with one. A map of words (word_grades) is "" here: the reader
    of the table applies it, and what comes out is on our scale.
    """
    if not words or list(words) == [BY_RANK]:
        return words[0] if words else ""
    if word_grades(words):
        return ""
    grades: dict[float, int] = {}
    waiting: list[float] = []
    for word in words:
        value, equals, grade = word.partition("=")
        try:
            if not _is_number(value):
                raise ValueError
            waiting.append(float(value))
            if equals:
                if not 0 <= int(grade) <= MAX_GRADE:
                    raise ValueError
                grades.update(dict.fromkeys(waiting, int(grade)))
                waiting = []
        except ValueError:
            raise ValueError(
                f"grades: {word!r} is not THEIRS=OURS, OURS being 0 to {MAX_GRADE}, as in --grades 1,1.5=0,2=1,3=2; "
                f"or --grades {BY_RANK}"
            ) from None
    if waiting:
        last = as_text(waiting[-1])
        raise ValueError(f"grades: {last} has no grade; end the list as in {last}={MAX_GRADE}")
    return grades


def word_grades(words: Sequence[str]) -> dict[str, int]:
    """["Irrelevant=0", "Partial=1"] -> {"irrelevant": 0, "partial": 1}; {} where the values are numbers, or no map.

    ValueError: words and numbers in one map, or a grade that is not ours.
    """
    pairs = [word.rpartition("=") for word in words]
    named = [(value.strip(), grade) for value, equals, grade in pairs if equals and not _is_number(value)]
    if not named:
        return {}
    if len(named) < len(words):
        raise ValueError("grades: one map holds either words or numbers, each as in --grades Irrelevant=0,Exact=2")
    for value, grade in named:
        if not (grade.isdecimal() and int(grade) <= MAX_GRADE):
            raise ValueError(f"grades: {value}={grade}: a grade from 0 to {MAX_GRADE} is needed")
    if len({grade for _, grade in named}) < 2:
        raise ValueError(f"grades: {','.join(words)} gives all documents one grade: nothing can be ranked by it")
    return {value.casefold(): int(grade) for value, grade in named}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def by_rank(values: Sequence[float]) -> dict[float, int]:
    """Value -> grade by its rank among the distinct values."""
    order = sorted(set(values))
    spread = MAX_GRADE / (len(order) - 1) if len(order) > MAX_GRADE + 1 else 1
    return {value: math.floor(rank * spread + 0.5) for rank, value in enumerate(order)}


def as_text(value: float) -> str:
    """A whole number in all its digits (1700000000), else six digits (1.33333), or more if these name another one."""
    if float(value).is_integer() and abs(value) < 1e16:
        return str(int(value))
    short = f"{value:g}"
    return short if abs(float(short) - value) <= SAME_VALUE / 100 else repr(value)


def as_flag(grades: Mapping[float, int]) -> str:
    """The map as the flag that states it: values of one grade share an "="; by rank where a line would not hold it."""
    if len(grades) > MAX_NAMED and dict(grades) == by_rank(list(grades)):
        return f"--grades={BY_RANK}"
    parts = []
    values = sorted(grades)
    for value, after in zip(values, [*values[1:], None]):
        shared = after is not None and grades[after] == grades[value]
        parts.append(as_text(value) if shared else f"{as_text(value)}={grades[value]}")
    return "--grades=" + ",".join(parts)


def map_grades(source: JudgedSource, words: Sequence[str], bad: BadRows) -> dict[str, int]:
    """Replace every grade of the source by one of ours; returns the map, {} if all stay as they are.

    words: of --grades. Grades that no rule covers are bad rows (see BadRows). InputError: --grades is malformed.
    """
    rule = parse_grades(words)
    tally = Counter(grade for grades in source.judged.values() for grade in grades.values())
    hint = ""
    if isinstance(rule, dict):
        mapping = _explicit(rule, tally)
    elif rule == BY_RANK:
        mapping = by_rank(list(tally))
    else:
        mapping, hint = _default(tally)
    if not rule and any(value != grade for value, grade in mapping.items()):
        LOGGER.warning("grades are mapped: %s (another --grades maps them otherwise)", as_flag(mapping))
    if min(mapping.values(), default=0) > 0 and len(mapping) > 1:
        LOGGER.warning(
            "no judgment has grade 0, so every judged document counts as relevant; where the lowest grade means not "
            "relevant, give --grades %s",
            BY_RANK,
        )
    for split, grades in source.judged.items():
        for pair in [pair for pair, grade in grades.items() if grade not in mapping]:
            path, row = source.rows[split, pair]
            bad.refuse(path, row, f"grade {as_text(grades[pair])} {hint}")
            del grades[pair]
        grades.update({pair: mapping[grade] for pair, grade in grades.items()})
    if all(value == grade for value, grade in mapping.items()):
        return {}
    return {as_text(value): mapping[value] for value in sorted(mapping)}


def _explicit(rule: Mapping[float, int], tally: Mapping[float, int]) -> dict[float, int]:
    """The rule for the values that there are. InputError names values that it lacks."""
    mapping: dict[float, int] = {}
    for value in tally:
        nearest = min(rule, key=lambda known: abs(known - value))
        if abs(nearest - value) <= SAME_VALUE:
            mapping[value] = rule[nearest]
    if lost := sorted(set(tally) - set(mapping)):
        raise InputError(
            f"--grades: {_some(lost)} of the source ({sum(tally[value] for value in lost)} judgments) has no grade; by "
            f"rank all would be {as_flag(by_rank(list(tally)))}"
        )
    return mapping


def _default(tally: Mapping[float, int]) -> tuple[dict[float, int], str]:
    """The map without --grades, and what is said of a grade that it lacks."""
    mapping = {value: int(max(value, 0)) for value in tally if on_scale(max(value, 0)) and value == int(value)}
    strays = sum(count for value, count in tally.items() if value not in mapping)
    if not strays:
        return mapping, ""
    whole = by_rank(list(tally))
    if strays >= STRAY_SHARE * sum(tally.values()) and len(tally) > 1:
        return whole, ""
    return (
        mapping,
        f"is no whole number from 0 to {MAX_GRADE}; if it is meant, {as_flag(whole)} maps all grades by rank",
    )


def _some(values: Sequence[float]) -> str:
    return ", ".join(as_text(value) for value in values[:5]) + (
        f" and {len(values) - 5} more" if len(values) > 5 else ""
    )
