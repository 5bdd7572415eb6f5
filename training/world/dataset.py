"""The built-in world: a seeded generator of readable search data, so that the product runs with no download.

It rewards what the product does. Searchers and documents use different words; the judged train queries show only part
of the synonyms, the click log shows all of them; and candidates hold word matches without the concept and the reverse.
See docs/world.md.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ranking.card import fingerprint
from ranking.click_models import ClickModel
from ranking.errors import InputError
from ranking.files import write_json
from ranking.schema import MAX_GRADE, write_table
from ranking.telemetry import bars_are_read
from training.clicks.click_pairs import ClickPairSettings, write_clicks
from training.clicks.privacy_gate import OPEN_GATE
from training.world.click_log import event_tables, simulate_log
from training.world.documents import Documents, make_documents
from training.world.drift import Drift, DriftSettings, draw_drift
from training.world.lexicon import Lexicon, load_lexicon
from training.world.queries import Corpus, Query, draw_query, grade

LOGGER = logging.getLogger(__name__)
SPLITS = ("train", "dev", "test")


@dataclass
class WorldConfig:
    """Sizes and shares of a built-in world.

    Args:
        lexicon: english, chinese, or the path of a lexicon file of your own
        seed: another seed is another world: documents, queries, hidden synonyms, clicks
        documents: documents in the corpus
        clicked_pairs: distinct query-document pairs with a satisfied click in the log
        log_queries: distinct queries in the log
        train_queries: judged train queries
        dev_queries: judged dev queries
        test_queries: judged test queries
        judged_documents: judged documents of each of those queries
        unlabelled_queries: queries without judgments, for the teacher to label
        candidates: documents of each unlabelled query, and of each log query
        lexical_share: probability that a searcher types the documents' own word; lower makes BM25 weaker
        hidden_share: share of each concept's synonyms that no judged train query uses (at least one; 0 for none)
        click_model: "pbm" (position-based) or "dbn" (dynamic Bayesian network)
        shown: documents of a logged page
        robot_share: pages by robots, as a share of people's pages
        messy_share: pages whose query is spelled with other case, spaces or full-width letters
        drift: intents that nobody has yet and words that will mean something else, for rounds of serving and retraining
            (training/world/drift.py); the dataset is the world before any of it
    """

    lexicon: str = "english"
    seed: int = 1
    documents: int = 20_000
    clicked_pairs: int = 60_000
    log_queries: int = 25_000
    train_queries: int = 300
    dev_queries: int = 200
    test_queries: int = 500
    judged_documents: int = 20
    unlabelled_queries: int = 4_000
    candidates: int = 20
    lexical_share: float = 0.45
    hidden_share: float = 0.5
    click_model: Literal["pbm", "dbn"] = "pbm"
    shown: int = 10
    robot_share: float = 0.01
    messy_share: float = 0.05
    drift: DriftSettings = field(default_factory=DriftSettings)

    def __post_init__(self):
        for name in ("documents", "clicked_pairs", "log_queries", "candidates", "judged_documents", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        for name in ("lexical_share", "hidden_share", "robot_share", "messy_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a share from 0 to 1 is needed")
        for name in ("candidates", "judged_documents"):
            if getattr(self, name) > self.documents:
                raise ValueError(f"{name} is {getattr(self, name)}: there are only {self.documents} documents")
        if self.shown > self.candidates:
            raise ValueError(f"shown is {self.shown}: a page has at most {self.candidates} candidates")

    @classmethod
    def small(cls, **changes) -> WorldConfig:
        """A world made in about a second: 600 documents, 1,000 clicked pairs, 40 + 20 + 40 judged queries."""
        sizes = {"documents": 600, "clicked_pairs": 1_000, "log_queries": 800, "train_queries": 40, "dev_queries": 20}
        sizes |= {"test_queries": 40, "judged_documents": 12, "unlabelled_queries": 60, "candidates": 12}
        return cls(**{**sizes, **changes})


@dataclass(frozen=True)
class World:
    """A world in memory.

    judged: queries by split; hidden: synonyms (concept, form) outside the train split; drift: what later rounds change.
    """

    config: WorldConfig
    lexicon: Lexicon
    corpus: Corpus
    hidden: set[tuple[int, int]]
    judged: dict[str, list[Query]]
    unlabelled: list[Query]
    logged: list[Query]
    drift: Drift
    luck: random.Random = field(repr=False)

    @property
    def documents(self) -> Documents:
        """The documents of the corpus."""
        return self.corpus.documents

    def grades(self, query: Query, rows: list[int]) -> np.ndarray:
        """Grades 0..4 of document rows for a query, int8 [rows]."""
        return grade(query, self.documents, np.asarray(rows, dtype=np.int64), self.corpus.family)


def make_world(config: WorldConfig) -> World:
    """Documents and queries of a world. InputError if its concepts cannot make as many distinct queries as asked."""
    lexicon = load_lexicon(config.lexicon)
    rng = np.random.default_rng([config.seed, 1])
    luck = random.Random(config.seed)
    hidden = lexicon.draw_hidden(config.hidden_share, rng)
    corpus = Corpus(lexicon, make_documents(lexicon, config.documents, rng))
    drift = draw_drift(lexicon, config.drift, np.random.default_rng([config.seed, 3]))

    taken_intents: set = set()
    taken_words: set[str] = set()

    def draw(count: int, judged: bool, new_intent: bool, purpose: str) -> list[Query]:
        queries: list[Query] = []
        misses = 0
        while len(queries) < count:
            misses += 1
            if misses > 1000:  # in a row
                raise InputError(f"{purpose} is {count}: {config.documents} documents allow only {len(queries)}")
            query = draw_query(corpus, config.lexical_share, hidden, luck, judged)
            words = lexicon.grammar.bag(query.text)
            if not drift.searched(query.head, 0):
                continue
            if words in taken_words or (new_intent and query.intent() in taken_intents):
                continue
            taken_words.add(words)
            if new_intent:
                taken_intents.add(query.intent())
            queries.append(query)
            misses = 0
        return queries

    # A judged intent stands in one split only, so that no reworded test query is trained on; its words occur in
    # no other query, the click log included.
    sizes = {"train": config.train_queries, "dev": config.dev_queries, "test": config.test_queries}
    judged = {split: draw(n, split == "train", True, f"{split}_queries") for split, n in sizes.items()}
    unlabelled = draw(config.unlabelled_queries, False, False, "unlabelled_queries")
    logged = draw(config.log_queries, False, False, "log_queries")
    return World(config, lexicon, corpus, hidden, judged, unlabelled, logged, drift, luck)


def pair_rows(world: World, queries: list[Query], prefix: str, count: int, graded: bool) -> pa.Table:
    """A judgments or candidates table: count candidates for each query."""
    rows = [world.corpus.candidates(query, count, world.luck) for query in queries]
    doc = np.array(rows, dtype=np.int64).reshape(-1)
    of_query = np.repeat(np.arange(len(queries)), count)
    columns = {
        "query_id": pa.array([f"{prefix}{number:05d}" for number in range(len(queries))]).take(of_query),
        "doc_id": world.documents.doc_ids.take(doc),
        "query": pa.array([query.text for query in queries], pa.string()).take(of_query),
        "title": world.documents.titles.take(doc),
        "summary": world.documents.summaries.take(doc),
    }
    if graded:
        grades = [world.grades(query, row) for query, row in zip(queries, rows)]
        columns["grade"] = pa.array(np.concatenate(grades) if grades else [], pa.int8())
    return pa.table(columns)


def write_world(config: WorldConfig, out: str | Path) -> dict:
    """Write a dataset folder with every table of docs/data.md and return the content of its dataset.json.

    InputError if the sizes do not go together (more distinct queries or clicked pairs than the documents can yield).
    """
    out = Path(out)
    with tqdm(total=4, desc="world", unit="part", leave=False, disable=not bars_are_read()) as bar:
        world = make_world(config)
        bar.update()
        counts, grades = _write_pairs(world, out)
        bar.update()
        model, examined = _write_events(world, out / "events.parquet")
        bar.update()
        simulated = ClickPairSettings(events=str(out / "events.parquet"), out=out / "clicks.parquet", privacy=OPEN_GATE)
        report = write_clicks(simulated)
        bar.update()
    concepts = world.lexicon.concepts
    files = ["clicks.parquet", "candidates.parquet", *(f"judgments/{split}.parquet" for split in SPLITS)]
    content = {
        "source": f"world:{config.seed}" if config.lexicon == "english" else f"world:{config.lexicon}:{config.seed}",
        "licence": "Apache-2.0 (generated text)",
        "counts": {**counts, "events": report["events_read"], "clicks": report["clicks"]},
        "grades": grades,
        "fingerprint": fingerprint(*(out / file for file in files)),
        "world": asdict(config),
        "click_model": {**asdict(model), "propensities": examined},
        "hidden_synonyms": sorted({concepts[number].typed[form] for number, form in world.hidden}),
    }
    write_json(out / "dataset.json", content)
    LOGGER.info("world %d in %s: %s", config.seed, out, content["counts"])
    return json.loads((out / "dataset.json").read_text(encoding="utf-8"))


def _write_pairs(world: World, out: Path) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Write judgments and candidates; returns counts, and per split how many documents have each grade."""
    config = world.config
    counts = {"documents": config.documents}
    grades = {}
    for split in SPLITS:
        table = pair_rows(world, world.judged[split], f"{split}-q", config.judged_documents, graded=True)
        counts[f"judgments_{split}"] = write_table(out / f"judgments/{split}.parquet", "judgments", table)
        counts[f"queries_{split}"] = len(world.judged[split])
        tally = Counter(table.column("grade").to_pylist())
        grades[split] = {str(value): tally[value] for value in range(MAX_GRADE + 1)}
    table = pair_rows(world, world.unlabelled, "unlabelled-q", config.candidates, graded=False)
    counts["candidates"] = write_table(out / "candidates.parquet", "candidates", table)
    counts["queries_candidates"] = len(world.unlabelled)
    return counts, grades


def _write_events(world: World, path: Path) -> tuple[ClickModel, list[float]]:
    """Write the click log; returns its click model and the true chance that each position was examined."""
    config = world.config
    rng = np.random.default_rng([config.seed, 2])
    model = ClickModel(kind=config.click_model)
    candidates = np.array([world.corpus.candidates(query, config.candidates, world.luck) for query in world.logged])
    grades = np.stack([world.grades(query, row) for query, row in zip(world.logged, candidates)])
    log = simulate_log(candidates, grades, model, rng, config.clicked_pairs, config.shown, config.robot_share)
    texts = [query.text for query in world.logged]
    write_table(path, "events", event_tables(log, texts, world.documents, rng, config.messy_share))
    if config.click_model == "pbm":
        return model, model.propensities(config.shown).tolist()
    # of a DBN it depends on what stands above, so it is what the logged ranker's pages came to
    return model, [round(float(share), 4) for share in log.examined_share]
