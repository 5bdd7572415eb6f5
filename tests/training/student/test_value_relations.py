"""Value relations: the divergence itself, whose values are read in each family, what training makes of it, refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.limits import FieldLimits
from tests.helpers.foreign_encoders import ENCODERS, make_encoder
from tests.training.student.test_students import TINY, distilled, word_count_labels
from training.distill_student import Config, DistillationSettings, distill_student
from training.student.encoder import StudentModelSettings, create_student
from training.student.student_groups import groups_of
from training.student.student_training import start_student
from training.student.value_relations import ValueRelations, check_relation_teacher, relation_divergence
from training.train_baseline import Config as BaselineConfig
from training.train_baseline import train_baseline
from training.trainer.group_batches import GroupBatches, RankingGroups
from training.trainer.ranking_trainer import RankingTrainer
from training.trainer.token_store import TokenStore
from training.trainer.training_settings import TrainingSettings


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> Path:
    """Wider than the students below, with their tokenizer and limits."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    train_baseline(BaselineConfig(data=data, out=out, **TINY | {"size": "mini-3", "epochs": 0.5}))
    return out


def by_hand(student: np.ndarray, teacher: np.ndarray, heads: int) -> float:
    """The divergence of one text without padding, float [tokens, width] each, from its definition."""

    def relations(values: np.ndarray, head: int) -> np.ndarray:
        part = values[:, head * values.shape[1] // heads : (head + 1) * values.shape[1] // heads]
        products = np.exp(part @ part.T / np.sqrt(part.shape[1]))
        return products / products.sum(1, keepdims=True)

    pairs = [(relations(teacher, head), relations(student, head)) for head in range(heads)]
    return float(np.mean([(t * np.log(t / s)).sum(1) for t, s in pairs]))


def test_the_divergence_is_its_definition_whatever_the_widths_and_the_padding():
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(2, 7, 12, generator=draw).requires_grad_()
    teacher = torch.randn(2, 7, 20, generator=draw)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    found = relation_divergence(student, teacher, mask, heads=4)
    wanted = [by_hand(*(v[i, : int(mask[i].sum())].detach().double().numpy() for v in (student, teacher)), 4)
              for i in range(2)]  # fmt: skip
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    found.sum().backward()
    assert student.grad[1, :4].abs().min() > 0 and not student.grad[1, 4:].any()
    assert relation_divergence(teacher, teacher, mask, 4).tolist() == pytest.approx([0, 0], abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relation_divergence(student, teacher, mask, 4), found)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_values_of_the_last_layer_are_compared_and_nothing_else(family, tmp_path):
    folder = make_encoder(tmp_path, family)
    inputs = {"input_ids": torch.arange(10, 22).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}

    def divergence(changed: str) -> float:
        """Between the model and a copy in which one projection of the last layer is another."""
        models = [AutoModelForSequenceClassification.from_pretrained(folder).eval() for _ in range(2)]
        if changed:
            width = models[1].config.hidden_size
            rows = {"query": slice(0, width), "key": slice(width, 2 * width), "value": slice(2 * width, None)}
            names = [f"layer.1.attention.self.{changed}{ending}.weight" for ending in ("", "_proj")]
            for name, weight in models[1].named_parameters():
                if name.endswith("layers.1.attn.Wqkv.weight"):
                    weight.data[rows[changed]].normal_(0, 0.25)
                elif name.endswith(tuple(names)):
                    weight.data.normal_(0, 0.25)
        with ValueRelations(models[1], 1.0, 4).text_loss_of(models[0]) as text_loss, torch.no_grad():
            models[0](**inputs)
            return float(text_loss(inputs).mean())

    assert divergence("") == divergence("query") == divergence("key") == 0
    assert divergence("value") > 1e-3


def test_a_student_comes_to_relate_values_as_its_teacher_does(data, teacher, tmp_path):
    """Also with documents in chunks, judgments mixed in and activations computed anew in the backward pass."""

    def apart(student: Path) -> float:
        models = [AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in (student, teacher)]
        settings = DistillationSettings(data=data, out=tmp_path / "none", init=str(student))
        groups = groups_of([word_count_labels(data).slice(0, 40)], "teacher_score", start_student(settings).text_format)
        inputs = groups.store.pad(range(40), 0, token_types=True)
        with ValueRelations(models[1], 1.0, 16).text_loss_of(models[0]) as text_loss, torch.no_grad():
            models[0](**inputs)
            return float(text_loss(inputs).mean())

    knobs = {"epochs": 4, "group_documents": 6}
    plain = distilled(data, tmp_path / "plain", **knobs)
    card = distilled(data, tmp_path / "taught", relation_teacher=teacher, relation_weight=30.0, **knobs)
    assert apart(tmp_path / "taught") < 0.7 * apart(tmp_path / "plain")
    assert set(card.trained_on) - set(plain.trained_on) == {"relation teacher"}
    assert list(card.metrics) == list(plain.metrics)
    mixed = {"judged_weight": 0.5, "gradient_checkpointing": True, "chunks": 3, "chunk_overlap": 2}
    distilled(data, tmp_path / "mixed", relation_teacher=teacher, **mixed)


@pytest.mark.parametrize("process_count", [1, 2])
def test_a_loss_of_texts_counts_each_document_once_however_many_chunks_and_processes(process_count, tmp_path):
    rng = np.random.default_rng(0)
    chunks = np.array([1, 3, 2, 1, 5, 1])
    starts = np.concatenate([[0], np.cumsum(chunks)])
    store = TokenStore.build([rng.integers(5, 50, rng.integers(3, 12)) for _ in range(starts[-1])])
    groups = RankingGroups.of_rows(list("aabbcc"), np.arange(6.0), store, starts, "mean")
    model = AutoModelForSequenceClassification.from_pretrained(make_encoder(tmp_path / "bert", "bert"))
    parts = []
    for text_loss in (None, lambda inputs: inputs["input_ids"].sum(1).float()):
        settings = TrainingSettings(precision="fp32", forward_tokens=20)
        trainer = RankingTrainer(
            model, settings, groups, None, loss=lambda scores, *_: scores.mean(), pad_id=0,
            out=tmp_path / f"run-{text_loss is None}", text_loss=text_loss,
        )  # fmt: skip
        shares = [
            GroupBatches(groups, batch_groups=3, forward_tokens=20, pad_id=0, seed=0,
                         process_index=i, process_count=process_count)[0]
            for i in range(process_count)
        ]  # fmt: skip
        parts.append(sum(trainer.compute_loss(model, share).item() for share in shares))
    sums = np.array([store[row].sum() for row in range(len(store))])
    wanted = np.mean([sums[start:end].mean() for start, end in pairwise(starts)])
    assert parts[1] - parts[0] == pytest.approx(wanted, rel=1e-5)


def refusal(data: Path, out: Path, folder: Path, **knobs) -> str:
    settings = DistillationSettings(data=data, out=out, relation_teacher=folder, **(TINY | knobs))
    with pytest.raises(InputError) as problem:
        check_relation_teacher(settings, start_student(settings))
    return str(problem.value)


def test_a_teacher_that_reads_something_else_is_refused(data, teacher, tmp_path):
    out = tmp_path / "student"
    other = create_student(StudentModelSettings(size="tiny-2", vocabulary_size=300), data, tmp_path / "other", seed=1)
    assert "another tokenizer" in refusal(data, out, teacher, tokenizer=other.tokenizer_folder)
    assert "they must be equal" in refusal(data, out, teacher, limits=FieldLimits(8, 8, 11))
    assert "does not divide the width of the student, 32" in refusal(data, out, teacher, relation_heads=64)
    decoder = tmp_path / "decoder"
    decoder.mkdir()
    replace(ScoreCard.load(teacher), role="teacher").save(decoder)
    for folder, reason in ((decoder, "relation_teacher is a teacher"), (tmp_path / "nowhere", r"no ranker\.json")):
        with pytest.raises(InputError, match=reason):
            distill_student(Config(data=data, out=out, labels=tmp_path, relation_teacher=folder))
    with pytest.raises(ValueError, match="relation_weight is 0"):
        DistillationSettings(data=data, out=out, relation_weight=0)
