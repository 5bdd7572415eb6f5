"""The built-in world in a script without spaces: from the program that writes it to a student that learnt its words."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.schema import read_table
from training import evaluate, prepare_data
from training.distill_student import DistillationSettings, distill
from training.student.student_groups import groups_of
from training.student.student_training import start_student
from training.world.dataset import SPLITS, WorldConfig, make_world, pair_rows
from training.world.lexicon import load_lexicon

WORLD = WorldConfig.small(
    lexicon="chinese", documents=700, clicked_pairs=300, log_queries=200, train_queries=20, dev_queries=20,
    test_queries=40, unlabelled_queries=160,
)  # fmt: skip


def test_a_chinese_world_teaches_a_student_from_scratch(tmp_path):
    data = tmp_path / "data"
    prepare_data.main(prepare_data.Config(source="world", out=data, world=WORLD))
    assert json.loads((data / "dataset.json").read_text())["source"] == "world:chinese:1"
    assert len(read_table(data / "clicks.parquet", "clicks")) > 250
    student = distill_from_the_truth(data, tmp_path / "student")
    evaluate.main(
        evaluate.Config(
            data=data, system=["random", "bm25", f"student=checkpoint:{student}"], out=tmp_path / "evaluation",
            resamples=200, permutations=500,
        )
    )  # fmt: skip
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["systems"]
    ndcg = {name: row["metrics"]["ndcg@5"] for name, row in found.items()}
    assert ndcg["random"] + 0.1 < ndcg["bm25"] < 0.8
    assert ndcg["student"] > ndcg["random"] + 0.1
    assert found["student"]["against_first"]["ndcg@5"]["p"] < 0.05


def distill_from_the_truth(data, out):
    """A student of labels that are the world's own grades of the candidates: the best teacher there could be."""
    world = make_world(WORLD)
    for split in SPLITS:  # in the order in which the program drew them
        pair_rows(world, world.judged[split], split, WORLD.judged_documents, graded=True)
    truth = pair_rows(world, world.unlabelled, "unlabelled-q", WORLD.candidates, graded=True)
    candidates = read_table(data / "candidates.parquet", "candidates")
    assert truth.column("doc_id").to_pylist() == candidates.column("doc_id").to_pylist()
    labelled = candidates.append_column("teacher_score", truth.column("grade").cast(pa.float32()))
    settings = DistillationSettings(
        data=data, out=out, size="mini-3", vocabulary_size=1500, match_steps=120, limits=FieldLimits(12, 24, 40),
        epochs=1, batch_groups=8, learning_rate=1e-3, precision="fp32",
    )  # fmt: skip
    student = start_student(settings)
    distill(settings, student, groups_of([labelled], "teacher_score", student.text_format), None, {"truth": "grades"})
    return out


def test_texts_are_chinese_without_spaces_and_queries_hold_several_words(tmp_path):
    world = make_world(WORLD)
    texts = world.documents.titles.to_pylist() + world.documents.summaries.to_pylist()
    assert not any(" " in text or "{" in text for text in texts)
    queries = world.judged["test"]
    assert not any(" " in query.text for query in queries)
    assert sum(len(query.forms) > 1 for query in queries) > len(queries) / 2
    letters = [sorted(query.text) for split in SPLITS for query in world.judged[split]]
    assert len({tuple(each) for each in letters}) == len(letters)  # no query is another one in another order


@pytest.mark.parametrize(
    "content, reason",
    [
        ("a: {names: [x]}", "KeyError.*families"),
        ("grammar: {surprise: 1}", "surprise"),
        ("grammar: {titles: [a]}", "1 titles, 4 forms"),
        ("a: {families: {f: ['word =']}, attributes: [], settings: []}", "both sides"),
        ("- a", "domains by name are expected"),
    ],
)
def test_a_lexicon_of_ones_own_that_cannot_be_read_is_told_with_its_path(tmp_path, content, reason):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(InputError, match=rf"mine\.yaml: not a lexicon .*{reason}"):
        load_lexicon(str(tmp_path / "mine.yaml"))
    with pytest.raises(InputError, match=r"klingon: not a lexicon .*english, chinese"):
        load_lexicon("klingon")
