"""The built-in world: its promises to whoever trains on it."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from ranking.bm25 import bm25_scores
from ranking.errors import InputError
from ranking.metrics import ndcg
from ranking.schema import read_table
from training.world.dataset import SPLITS, WorldConfig, make_world, pair_rows, write_world
from training.world.lexicon import load_lexicon
from training.world.queries import Query

TABLES = {"clicks": "clicks", "candidates": "candidates", "events": "events"} | {
    f"judgments/{split}": "judgments" for split in SPLITS
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, write_world(WorldConfig.small(), folder)


@pytest.fixture(scope="module")
def world():
    """The default judged part; only as much of the log as the synonyms' test needs."""
    return make_world(WorldConfig(log_queries=8_000, unlabelled_queries=100))


def judged(world, split="test"):
    table = pair_rows(world, world.judged[split], "q", 20, graded=True)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    groups = np.repeat(np.arange(len(world.judged[split])), 20)
    return columns, np.array(columns["grade"]), groups


def test_every_table_holds_what_the_sizes_ask_for(small):
    folder, content = small
    config = WorldConfig.small()
    tables = {name: read_table(folder / f"{name}.parquet", table) for name, table in TABLES.items()}
    for split, queries in (("train", config.train_queries), ("dev", config.dev_queries), ("test", config.test_queries)):
        assert len(tables[f"judgments/{split}"]) == queries * config.judged_documents
        grades = Counter(tables[f"judgments/{split}"].column("grade").to_pylist())
        assert content["grades"][split] == {str(grade): grades[grade] for grade in range(5)}
    assert len(tables["candidates"]) == config.unlabelled_queries * config.candidates
    assert len(tables["clicks"]) == pytest.approx(config.clicked_pairs, rel=0.05)  # robots and their filter move it
    assert json.loads((folder / "dataset.json").read_text()) == content
    assert content["counts"]["events"] == len(tables["events"])


def test_the_same_seed_makes_the_same_world_and_another_seed_another(small, tmp_path):
    _, content = small
    again = write_world(WorldConfig.small(), tmp_path / "again")
    other = write_world(WorldConfig.small(seed=2), tmp_path / "other")
    assert again == content
    assert other["fingerprint"] != content["fingerprint"]
    assert other["hidden_synonyms"] != content["hidden_synonyms"]


def test_held_out_queries_occur_nowhere_else(small):
    folder, _ = small
    words = {
        name: {
            " ".join(sorted(q.lower().split())) for q in read_table(folder / f"{name}.parquet", t)["query"].to_pylist()
        }
        for name, t in TABLES.items()
        if name != "events"
    }
    names = list(words)
    for first, second in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :] if "judgments" in a + b):
        assert not words[first] & words[second], (first, second)


def test_a_judged_intent_stands_in_one_split_only(world):
    intents = [{query.intent() for query in world.judged[split]} for split in SPLITS]
    assert not any(a & b for a, b in pairwise([*intents, intents[0]]))


def test_the_judged_train_queries_show_part_of_the_synonyms_and_the_log_shows_all(world):
    every = set(world.lexicon.synonyms())
    in_train = {form for query in world.judged["train"] for form in query.forms if form[1]}
    in_log = {form for query in world.logged for form in query.forms if form[1]}
    assert not in_train & world.hidden
    assert 0.4 < len(world.hidden) / len(every) < 0.6
    assert in_log == every
    with_hidden = [any(form in world.hidden for form in query.forms) for query in world.judged["test"]]
    assert 0.4 < np.mean(with_hidden) < 0.7


def test_knowing_only_the_judged_synonyms_is_clearly_not_enough(world):
    columns, grades, groups = judged(world)
    documents = world.documents
    scores = []
    for number, query in enumerate(world.judged["test"]):
        rows = np.array([int(doc_id[1:]) for doc_id, g in zip(columns["doc_id"], groups) if g == number])
        score = np.zeros(len(rows))
        for concept, form in query.forms:
            if (concept, form) in world.hidden:
                continue
            if concept == query.head:
                score += 2.0 * (documents.head[rows] == concept) + 0.5 * (documents.companion[rows] == concept)
            else:
                score += documents.has[rows, concept]
        scores.append(score)
    assert ndcg(grades.astype(float), grades, groups, 5) == 1.0
    assert ndcg(np.concatenate(scores), grades, groups, 5) < 0.9


def test_bm25_is_well_above_random_well_below_a_reader_and_stable_over_seeds():
    found = []
    for seed in (1, 2, 3):
        world = make_world(WorldConfig(seed=seed, log_queries=1, unlabelled_queries=1))
        columns, grades, groups = judged(world)
        bm25 = ndcg(bm25_scores(columns["query"], columns["title"], columns["summary"]), grades, groups, 5)
        chance = ndcg(np.random.default_rng(seed).random(len(grades)), grades, groups, 5)
        assert bm25 > chance + 0.15
        assert 0.4 < bm25 < 0.7
        found.append(bm25)
    assert max(found) - min(found) < 0.06


def test_grades_follow_the_concept_overlap(world):
    """Every rule of docs/world.md on one real document."""
    documents = world.documents
    family = world.corpus.family
    row = next(row for row in range(len(documents)) if documents.has[row].sum() >= 2 and documents.companion[row] >= 0)
    head, companion = int(documents.head[row]), int(documents.companion[row])
    own = [int(c) for c in np.flatnonzero(documents.has[row])[:2]]
    domain = world.lexicon.domains[world.lexicon.concepts[head].domain]
    foreign = [c.number for c in domain.attributes if not documents.has[row, c.number]][:2]
    sibling = next(c for c in range(len(family)) if family[c] == family[head] and c not in (head, companion))
    stranger = next(c.number for c in domain.heads if family[c.number] != family[head] and c.number != companion)
    for wanted, modifiers, expected in (
        (head, [], 4),
        (head, own[:1], 4),
        (head, own, 4),
        (head, [own[0], foreign[0]], 3),
        (head, foreign[:1], 2),
        (head, foreign, 2),
        (companion, [], 1),
        (companion, own, 1),
        (sibling, own, 1),
        (sibling, [], 0),
        (sibling, foreign[:1], 0),
        (stranger, own, 0),
    ):
        query = Query(wanted, tuple(modifiers), ((wanted, 0),), (wanted,), "-")
        assert world.grades(query, [row]).tolist() == [expected], (wanted, modifiers)


def test_candidates_hold_word_matches_without_the_concept_and_concepts_without_a_word(world):
    columns, grades, _ = judged(world)
    words = [
        (set(q.split()), set(f"{t} {s}".lower().replace(",", " ").replace(".", " ").split()))
        for q, t, s in zip(columns["query"], columns["title"], columns["summary"])
    ]
    shares_word = np.array([bool(query & document) for query, document in words])
    assert (shares_word & (grades == 0)).mean() > 0.05
    assert (~shares_word & (grades >= 3)).mean() > 0.03


def test_texts_are_short_finished_english(small):
    folder, _ = small
    rows = read_table(folder / "judgments/test.parquet", "judgments").to_pylist()
    for row in rows:
        assert row["title"][0].isupper() or row["title"][0].isdigit()
        assert 2 <= len(row["title"].split()) <= 16
        assert 4 <= len(row["summary"].split()) <= 45
        assert row["summary"].endswith((".", "?"))
        assert not set("{}|=") & set(row["title"] + row["summary"])
        assert "  " not in row["title"] + row["summary"]


@pytest.mark.parametrize("name, least", [("english", 200), ("chinese", 80)])
def test_the_lexicon_gives_every_concept_its_own_searcher_words(name, least):
    lexicon = load_lexicon(name)
    assert least <= len(lexicon.concepts) <= 500
    for concept in lexicon.concepts:
        assert len(concept.typed) >= 3
        assert not set(concept.typed[1:]) & set(concept.documents), concept


def test_a_dbn_world_records_how_often_each_position_was_examined(tmp_path):
    content = write_world(WorldConfig.small(click_model="dbn"), tmp_path)
    examined = content["click_model"]["propensities"]
    assert examined[0] == 1.0
    assert examined == sorted(examined, reverse=True)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"documents": 5}, "only 5 documents"),
        ({"lexical_share": 1.5}, "lexical_share"),
        ({"shown": 30}, "shown"),
    ],
)
def test_impossible_sizes_are_refused_at_construction(sizes, reason):
    with pytest.raises(ValueError, match=reason):
        WorldConfig.small(**sizes)


def test_more_clicked_pairs_than_the_log_can_yield_are_refused(tmp_path):
    with pytest.raises(InputError, match="clicked_pairs is 9000"):
        write_world(WorldConfig.small(clicked_pairs=9_000), tmp_path)


def test_more_distinct_queries_than_a_tiny_corpus_allows_are_refused():
    with pytest.raises(InputError, match="log_queries"):
        make_world(WorldConfig.small(documents=20, train_queries=2, dev_queries=2, test_queries=2, log_queries=9_000))
