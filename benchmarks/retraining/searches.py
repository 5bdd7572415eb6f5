"""What the built-in world's users search in each round of its drift, and what each document is then worth to them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ranking.errors import InputError
from training.world.dataset import World
from training.world.documents import popularity
from training.world.drift import candidates_of, corpus_of_round
from training.world.queries import Query, draw_query

Kind = Literal["unchanged", "new", "moved"]
EVEN = 40  # flattens how often each query is typed, so that most of them have the users that the privacy gate asks for


@dataclass(frozen=True)
class Search:
    """A wish as it is typed in a round. rows: documents that compete; grades: int8, of these; kind: against round 0."""

    text: str
    rows: tuple[int, ...]
    grades: NDArray[np.int8]
    kind: Kind


@dataclass(frozen=True)
class Wishes:
    """What people want, whatever the words. share: how often, float [wishes]; tested: held out of the traffic."""

    world: World
    typed: list[Query]
    share: NDArray[np.float64]
    tested: list[Query]

    @classmethod
    def draw(cls, world: World, typed: int, tested: int) -> Wishes:
        """Distinct wishes of all rounds; none is typed like a judged or unlabelled query of the world."""
        luck = random.Random(f"wishes {world.config.seed}")
        taken = {query.text for queries in (*world.judged.values(), world.unlabelled) for query in queries}
        drawn: list[Query] = []
        for _ in range(200 * (typed + tested)):
            query = draw_query(world.corpus, world.config.lexical_share, set(), luck, judged=False)
            if query.text not in taken:
                taken.add(query.text)
                drawn.append(query)
            if len(drawn) == typed + tested:
                share = popularity(typed, np.random.default_rng([world.config.seed, 4]), EVEN)
                return cls(world, drawn[:typed], share, drawn[typed:])
        raise InputError(f"{typed + tested} distinct queries are wanted, {len(drawn)} were found: more documents")

    def of_round(self, round_number: int, wishes: list[Query]) -> list[Search | None]:
        """Each wish as it is typed in a round; None if nobody has it yet."""
        world = self.world
        corpus = corpus_of_round(world.corpus, world.drift, round_number)
        found: list[Search | None] = []
        for wish in wishes:
            if not world.drift.searched(wish.head, round_number):
                found.append(None)
                continue
            query = wish.typed_with(corpus.lexicon)
            rows = candidates_of(corpus, query, world.config.candidates, world.config.seed)
            new = wish.head in world.drift.arrival
            kind: Kind = "new" if new else "unchanged" if query.text == wish.text else "moved"
            found.append(Search(query.text, tuple(rows), world.grades(query, rows), kind))
        return found


def pairs_table(world: World, searches: list[Search]) -> pa.Table:
    """Query, title and summary of every document of the searches, with query_id, doc_id and grade: judgments."""
    rows = np.array([row for search in searches for row in search.rows], np.int64)
    number = np.repeat(np.arange(len(searches)), [len(search.rows) for search in searches])
    documents = world.documents
    return pa.table(
        {
            "query_id": pa.array([f"q{n:05d}" for n in range(len(searches))], pa.string()).take(number),
            "doc_id": documents.doc_ids.take(rows),
            "query": pa.array([search.text for search in searches], pa.string()).take(number),
            "title": documents.titles.take(rows),
            "summary": documents.summaries.take(rows),
            "grade": pa.array(np.concatenate([search.grades for search in searches]), pa.int8()),
        }
    )
