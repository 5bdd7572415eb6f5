"""Baseline and student training end to end on a tiny world, and the parts they are made of."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from ranking.card import ScoreCard
from ranking.chunks import Chunking
from ranking.errors import DataError, InputError
from ranking.label_writer import write_labels
from ranking.limits import FieldLimits
from ranking.program import run
from ranking.schema import read_table
from ranking.text import StudentFormat, load_tokenizer
from training.distill_student import Config as StudentConfig
from training.distill_student import (
    DistillationSettings,
    StudentLossSettings,
    distill,
    distill_student,
    distillation_loss,
    teacher_scale,
)
from training.distill_student import main as distill_main
from training.evaluation.checkpoint_scores import score_pairs
from training.student import student_groups as student_data
from training.student.checkpoint import ScoreScale
from training.student.encoder import StudentModelSettings, create_student, scale_head
from training.student.masked_lm_warm_up import BATCH_TEXTS, MaskedTexts, WarmUpTrainer
from training.student.student_groups import groups_of, joined, judged_groups, sampler
from training.student.student_training import start_student
from training.train_baseline import Config as BaselineConfig
from training.train_baseline import main as baseline_main
from training.train_baseline import train_baseline
from training.trainer.losses import hybrid, ranknet
from training.trainer.training_settings import TrainingSettings

TINY = {
    "size": "tiny-2", "vocabulary_size": 800, "limits": FieldLimits(8, 8, 12),
    "epochs": 1, "learning_rate": 3e-3, "batch_groups": 8, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def baseline(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "baseline"
    train_baseline(BaselineConfig(data=data, out=out, loss="ranknet", calibrate="isotonic", **TINY))
    return out


def word_count_labels(data: Path) -> pa.Table:
    """Candidates with a teacher anyone can learn: 5 + 2 for each word that query and title share."""
    rows = read_table(data / "candidates.parquet", "candidates")
    shared = [len({*r["query"].lower().split()} & {*r["title"].lower().split()}) for r in rows.to_pylist()]
    return rows.append_column("teacher_score", pa.array(5.0 + 2.0 * np.array(shared), pa.float32()))


def distilled(data: Path, out: Path, weights: np.ndarray | None = None, **knobs) -> ScoreCard:
    settings = DistillationSettings(data=data, out=out, **(TINY | knobs))
    student = start_student(settings)
    labelled = groups_of([word_count_labels(data)], "teacher_score", student.text_format)
    return distill(settings, student, labelled, None, {"labels": "words"}, weights)


def text_columns(rows: pa.Table):
    return [rows.column(name).to_pylist() for name in ("query", "title", "summary")]


def test_a_baseline_reloads_to_the_scores_that_its_card_describes(baseline, data):
    card = ScoreCard.load(baseline)
    dev = read_table(data / "judgments/dev.parquet", "judgments")
    scores = score_pairs(baseline, *text_columns(dev))
    assert (card.role, card.pooling, card.limits.max_summary_tokens) == ("baseline", "cls", 12)
    assert scores.mean() == pytest.approx(card.score_mean, abs=1e-5)
    assert scores.std() == pytest.approx(card.score_spread, rel=1e-3)
    assert card.calibration["kind"] == "isotonic" and set(card.trained_on) == {"train", "dev"}
    assert not list(baseline.glob("*.bin")), "checkpoints are safetensors, never pickle"


def test_a_student_in_chunks_reloads_to_the_scores_that_its_card_describes_and_is_started_from(data, tmp_path):
    """Start, warm-up, labels with judgments mixed in, dev figures and the saved card all read the same chunks."""
    short = {"limits": FieldLimits(8, 8, 6), "chunks": 3, "chunk_overlap": 2}
    card = distilled(
        data, tmp_path / "student", judged_weight=0.5, match_steps=5, warm_up_epochs=0.2, **short
    )  # fmt: skip
    assert card.chunking == Chunking(most=3, overlap=2, pooling="max")
    rows = text_columns(read_table(data / "judgments/dev.parquet", "judgments"))
    scores = score_pairs(tmp_path / "student", *rows)
    assert scores.mean() == pytest.approx(card.score_mean, abs=1e-4)
    assert "up to 3 chunks" in (tmp_path / "student" / "README.md").read_text()
    beginning = shutil.copytree(tmp_path / "student", tmp_path / "beginning")
    replace(card, chunking=Chunking()).save(beginning)
    cut = score_pairs(beginning, *rows)
    assert (cut <= scores + 1e-5).all() and (cut < scores - 1e-5).any()
    settings = DistillationSettings(
        data=data, out=tmp_path / "next", init=str(tmp_path / "student"), chunk_pooling="mean"
    )
    assert start_student(settings).text_format.chunking == Chunking(3, 2, "mean")


def test_a_student_scores_on_the_teachers_raw_scale(data, tmp_path):
    distilled(data, tmp_path / "student", epochs=6, loss="point")
    rows = word_count_labels(data)
    teacher = rows.column("teacher_score").to_numpy()
    scores = score_pairs(tmp_path / "student", *text_columns(rows))
    assert scores.mean() == pytest.approx(teacher.mean(), abs=0.5)  # a standardised student would be near 0
    assert ((scores - teacher) ** 2).mean() < 1.1 * teacher.var()


def test_labels_of_one_document_a_query_do_not_train_a_loss_that_compares_documents(data, tmp_path, caplog):
    """Seen: hours of training with a gradient of zero, and a student of random scores."""
    rows = word_count_labels(data)
    alone = rows.take([rows.column("query_id").index(name).as_py() for name in rows.column("query_id").unique()])
    for loss, refused in (("margin", True), ("ranknet", True), ("kl", True), ("hybrid", False)):
        settings = DistillationSettings(data=data, out=tmp_path / loss, loss=loss, **TINY)
        student = start_student(settings)
        labelled = groups_of([alone], "teacher_score", student.text_format)
        with pytest.raises(InputError, match=f"one labelled document, and loss {loss}") if refused else nullcontext():
            distill(settings, student, labelled, None, {"labels": "words"})
    assert "only the point-wise part" in caplog.text


def test_the_teachers_card_sets_the_scale_if_it_is_given(data, tmp_path):
    groups = groups_of([word_count_labels(data)], "teacher_score", _text(data, tmp_path))
    card = ScoreCard("teacher", "f", 1, FieldLimits(1, 1, 1), "linear", "last_token", score_mean=4.0, score_spread=3.0)
    assert teacher_scale(groups, card).standardise(np.array([4.0, 10.0])).tolist() == [0.0, 2.0]
    assert teacher_scale(groups, None).mean == pytest.approx(float(groups.targets.mean()))


@pytest.mark.parametrize("offset, ratio, warned", [(1.5, 1, True), (0, 2.5, True), (0, 0.4, True), (0.5, 1.5, False)])
def test_a_card_that_is_hardly_that_of_the_labels_teacher_is_warned_of(data, tmp_path, caplog, offset, ratio, warned):
    groups = groups_of([word_count_labels(data)], "teacher_score", _text(data, tmp_path))
    own = ScoreScale.of(groups.targets)
    spread = ratio * own.spread
    card = ScoreCard(
        "teacher", "f", 1, FieldLimits(1, 1, 1), "linear", "last_token",
        score_mean=own.mean + offset * spread, score_spread=spread,
    )  # fmt: skip
    teacher_scale(groups, card)
    assert ("is it the teacher that gave them?" in caplog.text) == warned


def test_the_card_of_a_teacher_must_be_that_of_a_ranker(baseline, data, tmp_path):
    labels = labels_of(data, tmp_path / "labels")
    card = ScoreCard.load(baseline)
    distill_student(StudentConfig(data=data, labels=labels, teacher=baseline, out=tmp_path / "student", **TINY))
    wrong = (("role", "pretrained", "this checkpoint is a pretrained"), ("score_spread", 0.0, "all documents alike"))
    for name, change, reason in wrong:
        folder = tmp_path / name
        folder.mkdir()
        replace(card, **{name: change}).save(folder)
        with pytest.raises(InputError, match=reason):
            distill_student(StudentConfig(data=data, labels=labels, teacher=folder, out=tmp_path / "none", **TINY))
    assert not (tmp_path / "none").exists()


def test_weights_of_labels_leave_judged_documents_alone_and_ones_change_nothing():
    settings = StudentLossSettings(judged_weight=0.5)
    scores, target = torch.linspace(-2, 2, 8), torch.tensor([0.5, -1, 2, 0, 1, 3, 0, 2])
    source, groups = torch.tensor([0.0] * 4 + [1.0] * 4), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    loss = distillation_loss(settings)

    def with_weights(weights: list[float]) -> float:
        return float(loss(scores, torch.stack([target, source, torch.tensor(weights)], 1), groups))

    plain = float(loss(scores, torch.stack([target, source], 1), groups))
    assert with_weights([1.0] * 8) == pytest.approx(plain, rel=1e-6)
    assert with_weights([1.0] * 4 + [9.0] * 4) == pytest.approx(plain, rel=1e-6)
    assert with_weights([2.0, 2.0, 1.0, 1.0] + [1.0] * 4) > plain * 1.05


def test_a_student_trains_on_weighted_labels_with_judgments_mixed_in(data, tmp_path):
    weights = np.linspace(0.5, 1.5, len(word_count_labels(data))).astype(np.float32)
    card = distilled(data, tmp_path / "weighted", weights, judged_weight=0.5, group_documents=6)
    assert card.role == "student" and np.isfinite(card.score_spread)


@pytest.mark.parametrize("loss", ["hybrid", "margin", "ranknet", "ranknet_point", "kl"])
def test_every_loss_trains_with_judgments_mixed_in(data, tmp_path, loss):
    card = distilled(data, tmp_path / loss, loss=loss, judged_weight=0.5, group_documents=6, epochs=4)
    assert card.role == "student" and "train" in card.trained_on
    # A collapsed model scores all documents alike: 1e-6, the floor of the card. Runs here end between 0.01 and 0.4.
    assert card.score_spread > 1e-3


def test_a_student_starts_from_a_baseline_with_its_limits_and_standardised_scores(baseline, data, tmp_path):
    settings = StudentModelSettings(init=str(baseline), limits=FieldLimits(31, 8, 12))
    student = create_student(settings, data, tmp_path, seed=1)
    assert student.text_format.limits == FieldLimits(8, 8, 12)
    dev = judged_groups(data / "judgments/dev.parquet", student.text_format)
    with torch.no_grad():
        logits = student.model(**dev.store.pad(range(len(dev.store)), 0, token_types=True)).logits[:, 0]
    assert logits.mean().item() == pytest.approx(0.0, abs=1e-3) and logits.std().item() == pytest.approx(1.0, rel=0.01)


def test_init_layers_keeps_the_chosen_layers_in_their_order(baseline, data, tmp_path):
    source = load_file(baseline / "model.safetensors")
    student = create_student(StudentModelSettings(init=str(baseline), init_layers=[1]), data, tmp_path, seed=1)
    kept = student.model.state_dict()
    name = "attention.self.query.weight"
    assert torch.equal(kept[f"bert.encoder.layer.0.{name}"], source[f"bert.encoder.layer.1.{name}"])
    student.model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["num_hidden_layers"] == 1
    with pytest.raises(InputError, match="layers 0 to 1"):
        create_student(StudentModelSettings(init=str(baseline), init_layers=[0, 6]), data, tmp_path, seed=1)


def test_init_inner_keeps_the_neurons_of_largest_weight(baseline, data, tmp_path):
    source = load_file(baseline / "model.safetensors")
    names = [f"bert.encoder.layer.0.{place}.dense.weight" for place in ("intermediate", "output")]
    strength = source[names[0]].norm(dim=1) * source[names[1]].norm(dim=0)
    strongest = sorted(strength.argsort(descending=True)[:24].tolist())
    student = create_student(StudentModelSettings(init=str(baseline), init_inner=24), data, tmp_path, seed=1)
    assert student.base.endswith("inner 24")
    student.model.save_pretrained(tmp_path / "saved")
    kept = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(kept[names[0]], source[names[0]][strongest])
    assert torch.equal(kept[names[1]], source[names[1]][:, strongest])
    assert json.loads((tmp_path / "saved/config.json").read_text())["intermediate_size"] == 24
    opened = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    tokens = torch.tensor([[2, 7, 9, 3]])
    assert torch.allclose(opened(tokens).logits, student.model.eval()(tokens).logits, atol=1e-6)
    with pytest.raises(InputError, match="its layers have 64"):
        create_student(StudentModelSettings(init=str(baseline), init_inner=65), data, tmp_path, seed=1)


def test_all_inner_neurons_kept_change_no_score(baseline, data, tmp_path):
    whole, kept = (
        create_student(StudentModelSettings(init=str(baseline), init_inner=inner), data, tmp_path, seed=1).model.eval()
        for inner in (None, 64)
    )
    tokens = torch.tensor([[2, 7, 9, 3]])
    assert torch.equal(whole(tokens).logits, kept(tokens).logits)


def test_a_checkpoint_that_is_no_whole_bert_is_refused(data, tmp_path, baseline):
    config = BertConfig(
        vocab_size=800, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path / "short")
    (tmp_path / "short" / "tokenizer.json").write_bytes((baseline / "tokenizer.json").read_bytes())
    (tmp_path / "short" / "tokenizer_config.json").write_bytes((baseline / "tokenizer_config.json").read_bytes())
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path / "short")
    with pytest.raises(InputError, match="not a whole encoder"):
        create_student(StudentModelSettings(init=str(tmp_path / "short")), data, tmp_path / "work", seed=1)
    with pytest.raises(InputError, match="no such folder"):
        create_student(StudentModelSettings(init=str(tmp_path / "nowhere")), data, tmp_path / "work", seed=1)


def test_same_seed_same_model_other_seed_other_model(data, tmp_path):
    settings = StudentModelSettings(size="tiny-2", vocabulary_size=500)
    heads = [
        create_student(settings, data, tmp_path / str(i), seed).model.classifier.weight
        for i, seed in enumerate((1, 1, 2))
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_scaling_the_head_scales_every_score(baseline, data, tmp_path):
    student = create_student(StudentModelSettings(init=str(baseline)), data, tmp_path, seed=1)
    batch = judged_groups(data / "judgments/dev.parquet", student.text_format).store.pad(range(8), 0, token_types=True)
    with torch.no_grad():
        before = student.model(**batch).logits
        scale_head(student.model, 3.0, -2.0)
        after = student.model(**batch).logits
    assert torch.allclose(after, 3.0 * before - 2.0, atol=1e-5)


def test_a_warm_up_is_kept_for_a_resumed_run(data, tmp_path):
    config = DistillationSettings(data=data, out=tmp_path / "warm", warm_up_epochs=1, **TINY)
    name = "bert.encoder.layer.0.output.dense.weight"

    def start() -> torch.Tensor:
        return start_student(config).model.state_dict()[name]

    first, work = start(), config.out / "training"
    config.resume = True
    assert torch.equal(first, start())
    (work / "warm_up.safetensors").unlink()  # killed behind the warm-up's last checkpoint
    assert torch.equal(first, start())
    (work / "warm_up.safetensors").unlink()
    shutil.rmtree(work / "warm_up")  # killed while the warm-up's texts were tokenised
    assert torch.equal(first, start())
    cold = start_student(DistillationSettings(data=data, out=tmp_path / "cold", **TINY)).model.state_dict()[name]
    assert not torch.equal(first, cold)


def labels_of(data: Path, folder: Path, factor: float = 1.0) -> Path:
    """A finished labels folder of the candidates; scores are those of word_count_labels, times a factor."""
    rows = word_count_labels(data)
    scores = factor * rows.column("teacher_score").to_numpy()
    write_labels(folder, data / "candidates.parquet", rows, scores, "words", {})
    return folder


def test_a_training_that_failed_behind_its_warm_up_goes_on_from_there(data, tmp_path):
    labels, out = labels_of(data, tmp_path / "labels"), tmp_path / "student"
    config = StudentConfig(data=data, labels=labels, out=out, warm_up_epochs=1, **TINY)
    shard = (labels / "labels-00000.parquet").rename(tmp_path / "away")
    with pytest.raises(DataError, match="cannot be read"):
        distill_student(config)
    shard.rename(labels / "labels-00000.parquet")
    with pytest.raises(InputError, match=f"{out}: a run lies here already; continue it with --resume"):
        distill_student(config)
    warmed_up = (out / "training" / "warm_up.safetensors").stat().st_mtime_ns
    card = distill_student(replace(config, resume=True))
    assert (out / "training" / "warm_up.safetensors").stat().st_mtime_ns == warmed_up
    assert ScoreCard.load(out) == card


def test_what_the_warm_up_would_be_in_vain_without_is_asked_for_before_it(data, tmp_path):
    bare, labels = tmp_path / "data", labels_of(data, tmp_path / "labels")
    bare.mkdir()
    shutil.copyfile(data / "candidates.parquet", bare / "candidates.parquet")
    for missing in (labels, tmp_path / "nowhere"):
        config = StudentConfig(data=bare, labels=missing, out=tmp_path / "student", warm_up_epochs=1, **TINY)
        with pytest.raises(InputError, match=r"dev\.parquet" if missing == labels else r"no manifest\.json"):
            distill_student(config)
    assert not list((tmp_path / "student").rglob("checkpoint-*"))


def test_a_run_that_ends_while_it_writes_its_weights_has_not_finished(data, tmp_path, monkeypatch):
    """Seen: a finished run that was resumed kept its card beside weights half written."""
    distilled(data, tmp_path)

    def full(*words, **flags) -> None:
        raise OSError("full")

    monkeypatch.setattr("training.student.checkpoint.limit_other_tokenizers", full)
    with pytest.raises(OSError, match="full"):
        distilled(data, tmp_path, resume=True)
    with pytest.raises(InputError, match="has not finished; --resume goes on with it"):
        ScoreCard.load(tmp_path)
    monkeypatch.undo()
    assert distilled(data, tmp_path, resume=True) == ScoreCard.load(tmp_path)


def test_a_training_that_is_refused_leaves_the_tokenizer_of_the_one_that_lies_there(data, tmp_path):
    distilled(data, tmp_path)
    (tmp_path / "ranker.json").unlink()  # killed behind its last checkpoint
    tokenizer = tmp_path / "training" / "tokenizer" / "tokenizer.json"
    before = tokenizer.read_bytes()
    for resume, reason in ((False, "a run lies here already"), (True, "vocabulary_size was 800, now 500")):
        with pytest.raises(InputError, match=reason):
            distilled(data, tmp_path, vocabulary_size=500, resume=resume)
    assert tokenizer.read_bytes() == before


def test_a_student_is_not_resumed_on_other_labels(data, tmp_path):
    labels, out = labels_of(data, tmp_path / "labels"), tmp_path / "student"
    config = StudentConfig(data=data, labels=labels, out=out, **TINY)
    distill_student(config)
    shutil.rmtree(labels)
    labels_of(data, labels, factor=2.0)
    with pytest.raises(InputError, match=r"cannot resume .* data: content of labels was '\w+', now"):
        distill_student(replace(config, resume=True))


def test_masks_spare_special_tokens_and_are_the_same_for_all_processes(data, tmp_path):
    text_format = _text(data, tmp_path)
    store = groups_of([word_count_labels(data)], "teacher_score", text_format).store
    whole = MaskedTexts(store, text_format, 2000, seed=1)[0]
    shares = []
    for process in range(2):
        texts = MaskedTexts(store, text_format, 2000, seed=1)
        texts.process_index, texts.process_count = process, 2
        shares.append(texts[0])
    masked = [sum(int((labels != -100).sum()) for labels in share["labels"]) for share in (whole, *shares)]
    assert masked[0] == masked[1] + masked[2] == whole["normaliser"] == shares[0]["normaliser"]
    assert 0.1 < masked[0] / store.lengths[whole_rows(whole, store)].sum() < 0.2
    for labels in whole["labels"]:
        assert not torch.isin(labels, torch.tensor([text_format.cls_id, text_format.sep_id])).any()


def test_a_warm_up_batch_of_fewer_texts_than_processes_trains_on_all_of_them(data, tmp_path):
    """Seen: a candidates file of 128 n + 1 rows ended a warm-up in two processes with a traceback."""
    text_format = _text(data, tmp_path)
    store = groups_of([word_count_labels(data)], "teacher_score", text_format).store
    model = create_student(StudentModelSettings(**_model(TINY)), data, tmp_path, 1).model
    counts = []
    for process in range(2):
        texts = MaskedTexts(store.take(np.arange(BATCH_TEXTS + 1)), text_format, 2000, seed=1)
        trainer = WarmUpTrainer(BertForMaskedLM(model.config), TrainingSettings(), texts, tmp_path / str(process))
        texts.process_index, texts.process_count = process, 2
        loss = trainer.compute_loss(trainer.model, texts[1])
        loss.backward()
        assert loss.isfinite() and (loss == 0) == (process == 1)
        counts.append(len(texts[1]["forwards"]))
    assert counts == [1, 1]


def _model(knobs: dict) -> dict:
    return {name: knobs[name] for name in ("size", "vocabulary_size", "limits")}


def whole_rows(item, store):
    return slice(0, sum(len(forward["input_ids"]) for forward in item["forwards"]))


def test_stratified_sampling_spreads_over_the_score_range():
    scores = np.concatenate([np.zeros(90), np.linspace(1, 10, 10)]).astype(np.float32)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        assert (scores[sampler("stratified", 8)(scores, rng)] > 0).sum() >= 6
        assert len(set(sampler("stratified", 8)(scores, rng))) == 8
    uniform = [(scores[sampler("uniform", 8)(scores, np.random.default_rng(s))] > 0).mean() for s in range(200)]
    assert np.mean(uniform) == pytest.approx(0.1, abs=0.03)
    assert sorted(sampler("top", 3)(scores, np.random.default_rng(0))) == [97, 98, 99]


def test_sampling_takes_all_of_a_small_group_and_ties():
    rng = np.random.default_rng(0)
    assert sampler("stratified", 0) is None
    for kind in ("stratified", "uniform", "top"):
        assert sampler(kind, 5)(np.ones(3, np.float32), rng).tolist() == [0, 1, 2]
        assert len(set(sampler(kind, 5)(np.ones(9, np.float32), rng))) == 5


def test_a_query_in_both_sets_stays_two_groups(data, tmp_path):
    groups = judged_groups(data / "judgments/dev.parquet", _text(data, tmp_path))
    both = joined(groups, groups)
    assert len(both) == 2 * len(groups) and both.group_starts[-1] == 2 * groups.group_starts[-1]
    assert both.targets[:, 1].mean() == 0.5
    assert (both.store[len(groups.store)] == groups.store[0]).all()


def test_mixed_targets_split_into_labels_and_grades():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(2, 6, generator=generator)
    groups, grades = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([2.0, 0.0, 1.0])
    targets = torch.stack([torch.cat([labels[:3], grades]), torch.tensor([0.0, 0, 0, 1, 1, 1])], dim=1)
    loss = distillation_loss(StudentLossSettings(alpha=0.5, beta=2.0, judged_weight=0.25))
    expected = hybrid(scores[:3], labels[:3], groups[:3], 0.5, 2.0, "sum")
    expected = (expected + 0.25 * ranknet(scores[3:], grades, groups[3:], "sum")) / 6
    assert torch.allclose(loss(scores, targets, groups), expected)


def test_a_share_of_queries_is_drawn_whole_and_repeatably(data, tmp_path):
    groups = judged_groups(data / "judgments/train.parquet", _text(data, tmp_path))
    draw = partial(student_data.first_queries, groups, 0.25)
    assert draw(1).query_ids == draw(1).query_ids != draw(2).query_ids
    few = draw(1)
    assert len(few) == 6 and few.group_starts[-1] == len(few.targets) == len(few.store)
    place = groups.query_ids.index(few.query_ids[2])
    assert (few.store[few.group_starts[2]] == groups.store[groups.group_starts[place]]).all()


@pytest.mark.parametrize(
    "knobs, name",
    [({"loss": "hybrid", "alpha": 0.0, "beta": 0.0}, "alpha"), ({"temperature": 0.0}, "temperature"),
     ({"size": "huge"}, "size"), ({"init_layers": [1]}, "init"), ({"init_inner": 8}, "init_inner"),
     ({"epochs": 0}, "epochs"), ({"group_documents": 1}, "group_documents"),
     ({"judged_documents": 1}, "judged_documents")],
)  # fmt: skip
def test_a_wrong_knob_is_named_at_construction(knobs, name):
    with pytest.raises(ValueError, match=name):
        DistillationSettings(data=Path("d"), out=Path("o"), **knobs)


def test_one_document_a_query_is_no_group_for_a_baseline():
    with pytest.raises(ValueError, match="group_documents is 1: one document of a query has no order"):
        BaselineConfig(data=Path("d"), out=Path("o"), group_documents=1)


def _text(data: Path, work: Path) -> StudentFormat:
    settings = StudentModelSettings(size="tiny-2", vocabulary_size=800)
    folder = create_student(settings, data, work / "text", seed=1).tokenizer_folder
    return StudentFormat(load_tokenizer(folder), FieldLimits(8, 8, 12))


def test_missing_labels_and_judgments_end_in_one_line(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(
            distill_main, StudentConfig, example="",
            argv=["--data", str(data), "--labels", str(tmp_path), "--out", str(tmp_path / "o"), "--size", "tiny-2"],
        )  # fmt: skip
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path}: no manifest.json")
    with pytest.raises(SystemExit) as ended:
        run(baseline_main, BaselineConfig, example="", argv=["--data", str(tmp_path), "--out", str(tmp_path / "p")])
    assert ended.value.code == 1
    assert "no candidates, clicks or train judgments" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        run(baseline_main, BaselineConfig, example="", argv=["--data", "nowhere", "--out", str(tmp_path / "q")])
    assert "nowhere: no such folder; a dataset folder" in capsys.readouterr().err.splitlines()[-1]


def test_a_training_whose_lines_go_to_a_file_draws_no_bars(data, tmp_path, capsys, caplog, monkeypatch):
    """Seen: a night's log was one line of a hundred thousand states of a bar."""
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    caplog.set_level("INFO")
    words = ["--size", "tiny-2", "--vocabulary-size", "800", "--epochs", "1", "--log-steps", "1"]
    with pytest.raises(SystemExit) as ended:
        run(baseline_main, BaselineConfig, example="", argv=["--data", str(data), "--out", str(tmp_path / "o"), *words])
    said = capsys.readouterr()
    assert ended.value.code == 0 and "\r" not in said.err and said.out == ""
    assert [line.message for line in caplog.records if line.message.startswith("step 1: loss")]
