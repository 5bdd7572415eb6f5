"""Both teacher stages as programs on a small built-in world: what is predicted, resumed, saved and refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import TrainerCallback

from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.schema import read_table, write_table
from training import finetune_teacher, pretrain_teacher
from training.evaluation.checkpoint_scores import score_pairs
from training.teacher.decoder import open_decoder, open_tokenizer
from training.teacher.language_trainer import LanguageTrainer
from training.trainer.batch_trainer import BatchTrainer
from training.trainer.text_batches import TextBatches
from training.trainer.token_store import TokenStore
from training.world.dataset import WorldConfig, write_world

SMALL = {"precision": "fp32", "log_steps": 1, "from_scratch": "100K", "vocabulary": 400, "learning_rate": 3e-3}
LIMITS = {"limits": FieldLimits(max_query_tokens=12, max_title_tokens=16, max_summary_tokens=24)}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    sizes = WorldConfig(
        documents=300, clicked_pairs=300, log_queries=250, train_queries=12, dev_queries=6, test_queries=6,
        unlabelled_queries=5, candidates=10,
    )  # fmt: skip
    write_world(sizes, folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    pretrain_teacher.main(pretrain_teacher.Config(data=world, out=out, held_out=0.1, epochs=2, **SMALL, **LIMITS))
    return out


def finetune(world: Path, model: Path, out: Path, **knobs) -> Path:
    defaults = {"precision": "fp32", "log_steps": 1, "epochs": 2, "batch_groups": 4, "learning_rate": 1e-3}
    finetune_teacher.main(finetune_teacher.Config(data=world, model=str(model), out=out, **(defaults | knobs)))
    return out


def history(out: Path, key: str) -> list[float]:
    last = max(
        (out / "training").glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1])
    )
    return [entry[key] for entry in json.loads(last.read_text())["log_history"] if key in entry]


def test_pretraining_lowers_perplexity_and_leaves_a_whole_checkpoint(pretrained, world):
    card = ScoreCard.load(pretrained)
    assert (card.role, card.head, card.limits.max_summary_tokens) == ("pretrained", "none", 24)
    assert card.metrics["perplexity"] < 0.7 * 400  # a uniform guess over the vocabulary
    assert card.metrics["real_token_share"] >= 0.9
    assert history(pretrained, "eval_loss")[-1] < history(pretrained, "eval_loss")[0]
    assert open_decoder(pretrained).config.pad_token_id == open_tokenizer(pretrained).pad_token_id
    assert not list(pretrained.glob("*.bin")) and not list(pretrained.glob("*.pt"))


def test_the_loss_is_on_the_document_tokens_alone():
    """Texts of two query and three document tokens: three predictions each, weighted by the click."""
    store = TokenStore.build([[5, 6, 7, 8, 2], [5, 6, 9, 2]], document_starts=[2, 2])
    batches = TextBatches(store, np.array([1.0, 3.0], np.float32), batch_texts=2, forward_tokens=99, pad_id=0, seed=0)
    batch = batches[0]
    assert batch["normaliser"] == 3 * 1.0 + 2 * 3.0
    rows = {tuple(ids): weights for ids, weights in zip(
        batch["forwards"][0]["input_ids"].tolist(), batch["forwards"][0]["weights"].tolist()
    )}  # fmt: skip
    assert rows == {(5, 6, 7, 8, 2): [0, 0, 1, 1, 1], (5, 6, 9, 2, 0): [0, 0, 3, 3, 0]}


def test_text_batches_hold_every_text_once_with_little_padding_on_any_number_of_processes():
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 99, rng.integers(10, 80)).tolist() for _ in range(1000)]
    store = TokenStore.build(texts, document_starts=[3] * len(texts))
    seen, orders, counts = [], [], []
    for process in range(3):
        batches = TextBatches(
            store, None, batch_texts=64, forward_tokens=1000, pad_id=0, seed=1, process_index=process, process_count=3
        )
        assert batches.real_share() > 0.9
        orders.append([b.tolist() for b in batches.batches])
        for i in range(len(batches)):
            for forward in batches[i]["forwards"]:
                counted = forward["weights"].sum(1) > 0
                seen += [tuple(r[r > 0].tolist()) for r in forward["input_ids"][counted]]
        counts.append([len(batches[i]["forwards"]) for i in range(len(batches))])
    assert sorted(seen) == sorted(map(tuple, texts))
    assert orders[0] == orders[1] == orders[2] and counts[0] == counts[1] == counts[2]


def test_pretraining_resumes_to_the_losses_of_an_uninterrupted_run(world, tmp_path, monkeypatch):
    knobs = {**SMALL, **LIMITS, "data": world, "held_out": 0.1, "epochs": 2, "batch_groups": 32, "eval_steps": 4}
    pretrain_teacher.main(pretrain_teacher.Config(out=tmp_path / "whole", **knobs))
    monkeypatch.setattr(LanguageTrainer, "start", _stopping_start)
    pretrain_teacher.main(pretrain_teacher.Config(out=tmp_path / "parts", **knobs))
    monkeypatch.undo()
    assert len(history(tmp_path / "parts", "loss")) == 8
    pretrain_teacher.main(pretrain_teacher.Config(out=tmp_path / "parts", resume=True, **knobs))
    whole, resumed = (history(tmp_path / name, "loss") for name in ("whole", "parts"))
    assert len(whole) == len(resumed) > 12
    np.testing.assert_allclose(resumed, whole, rtol=0, atol=1e-6)


def _stopping_start(self) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == 8

    self.add_callback(Stop())
    BatchTrainer.start(self)


@pytest.mark.parametrize("knobs", [{}, {"loss": "ranknet", "lora_rank": 4}, {"loss": "point", "pooling": "mean"}])
def test_a_teacher_reloads_to_the_scores_of_its_card(world, pretrained, tmp_path, knobs):
    out = finetune(world, pretrained, tmp_path / "teacher", **knobs)
    card = ScoreCard.load(out)
    assert (card.role, card.head, card.pooling) == ("teacher", "linear", knobs.get("pooling", "last_token"))
    assert card.limits == FieldLimits(12, 16, 24)
    assert {"clicks", "judgments/train", "judgments/dev"} == set(card.trained_on)
    dev = read_table(world / "judgments" / "dev.parquet", "judgments")
    scores = score_pairs(out, *(dev.column(name).to_pylist() for name in ("query", "title", "summary")))
    assert scores.mean() == pytest.approx(card.score_mean, abs=1e-5)
    assert scores.std() == pytest.approx(card.score_spread, abs=1e-5) and scores.std() > 1e-3
    assert card.metrics["ndcg@5"] == pytest.approx(max(history(out, "eval_ndcg@5")))
    assert (out / "adapter_config.json").exists() == bool(knobs.get("lora_rank"))
    if knobs.get("lora_rank"):
        with pytest.raises(InputError, match="a LoRA adapter; training goes on from"):
            finetune(world, out, tmp_path / "further")


def test_gradient_checkpointing_and_accumulation_keep_the_losses(world, pretrained, tmp_path):
    plain = finetune(world, pretrained, tmp_path / "plain", epochs=1)
    checkpointed = finetune(world, pretrained, tmp_path / "check", epochs=1, gradient_checkpointing=True)
    accumulated = finetune(world, pretrained, tmp_path / "sum", epochs=1, batch_groups=2, accumulation=2)
    for other in (checkpointed, accumulated):
        np.testing.assert_allclose(history(other, "loss"), history(plain, "loss"), atol=1e-5)


def test_two_processes_train_both_stages_as_one_does(world, pretrained, tmp_path):
    """The programs under torchrun (DDP over gloo): one vocabulary, one checkpoint, the losses of a single process."""
    flags = {**SMALL, **LIMITS, "held_out": 0.1, "epochs": 2}
    launch("pretrain_teacher", world, tmp_path / "double", flags)
    np.testing.assert_allclose(history(tmp_path / "double", "loss"), history(pretrained, "loss"), atol=1e-4)
    single = finetune(world, pretrained, tmp_path / "single")
    knobs = {"precision": "fp32", "log_steps": 1, "epochs": 2, "batch_groups": 4, "learning_rate": 1e-3}
    launch("finetune_teacher", world, tmp_path / "teacher", knobs | {"model": pretrained})
    np.testing.assert_allclose(history(tmp_path / "teacher", "loss"), history(single, "loss"), atol=1e-4)
    assert ScoreCard.load(tmp_path / "teacher").score_mean == pytest.approx(ScoreCard.load(single).score_mean, abs=1e-3)
    # few tokens a forward, so that both processes have documents to find the likelihood of
    likelihood = {"loss": "likelihood", "forward_tokens": 256}
    single = finetune(world, pretrained, tmp_path / "start", **likelihood)
    launch("finetune_teacher", world, tmp_path / "starts", knobs | {"model": pretrained} | likelihood)
    np.testing.assert_allclose(history(tmp_path / "starts", "loss"), history(single, "loss"), atol=1e-4)


def test_lora_in_two_processes_gives_the_scores_of_one(world, pretrained, tmp_path):
    knobs = {"lora_rank": 4, "epochs": 1, "loss": "ranknet"}
    single = finetune(world, pretrained, tmp_path / "single", **knobs)
    flags = {"precision": "fp32", "log_steps": 1, "batch_groups": 4, "learning_rate": 1e-3, "model": pretrained}
    launch("finetune_teacher", world, tmp_path / "double", flags | knobs)
    assert (tmp_path / "double" / "adapter_config.json").is_file()
    rows = read_table(world / "judgments" / "dev.parquet", "judgments")
    texts = [rows[name].to_pylist() for name in ("query", "title", "summary")]
    scores = score_pairs(single, *texts)
    np.testing.assert_allclose(score_pairs(tmp_path / "double", *texts), scores, atol=1e-3 * max(1.0, scores.std()))


def launch(program: str, world: Path, out: Path, flags: dict) -> None:
    values = {name: json.dumps(asdict(value)) if is_dataclass(value) else str(value) for name, value in flags.items()}
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        f"training.{program}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--data", str(world), "--out", str(out), *words],
        cwd=Path(__file__).parents[3], env=environment, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_reinitialised_weights_forget_the_pretraining(world, pretrained, tmp_path):
    out = finetune(world, pretrained, tmp_path / "anew", epochs=1, reinitialise=True)
    assert "clicks" not in ScoreCard.load(out).trained_on
    assert "drawn anew" in ScoreCard.load(out).base_model


def test_a_start_from_the_likelihood_reads_no_judged_train_query(world, pretrained, tmp_path, monkeypatch):
    without = tmp_path / "data"
    for name in ("candidates.parquet", "judgments/dev.parquet"):
        (without / name).parent.mkdir(parents=True, exist_ok=True)
        (without / name).symlink_to(world / name)
    start = finetune(without, pretrained, tmp_path / "start", loss="likelihood", train_queries=4, group_size=6)
    card = ScoreCard.load(start)
    assert set(card.trained_on) == {"clicks", "candidates", "judgments/dev"}
    assert card.role == "teacher" and card.score_spread > 1e-3
    further = ScoreCard.load(finetune(world, start, tmp_path / "teacher"))
    assert set(further.trained_on) == {"clicks", "candidates", "judgments/train", "judgments/dev"}
    with pytest.raises(InputError, match="this checkpoint is a teacher, a pretrained is needed"):
        finetune(world, start, tmp_path / "again", loss="likelihood")
    assert not (tmp_path / "again").exists()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="does not run under FSDP"):
        finetune(without, pretrained, tmp_path / "again", loss="likelihood")


def test_bf16_training_saves_float32_weights_and_a_finite_teacher(world, pretrained, tmp_path):
    out = finetune(world, pretrained, tmp_path / "bf16", epochs=1, precision="bf16")
    assert {p.dtype for p in saved_weights(out).values()} == {torch.float32}
    assert ScoreCard.load(out).score_spread > 0


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_bad_input_ends_in_one_reason(world, pretrained, tmp_path):
    with pytest.raises(ValueError, match="either model or from_scratch"):
        pretrain_teacher.Config(data=world, out=tmp_path)
    wrong_start = {
        "train_queries is -1": {"train_queries": -1},
        "LoRA": {"lora_rank": 4},
        "reinitialise": {"reinitialise": True},
    }
    for reason, knob in wrong_start.items():
        with pytest.raises(ValueError, match=reason):
            finetune_teacher.Config(data=world, out=tmp_path, model="any", loss="likelihood", **knob)
    with pytest.raises(InputError, match="one of 100K, 1M"):
        pretrain_teacher.main(
            pretrain_teacher.Config(data=world, out=tmp_path / "a", **(SMALL | {"from_scratch": "7B"}))
        )
    with pytest.raises(InputError, match="absent: no such folder"):
        finetune(world, tmp_path / "absent", tmp_path / "b")
    with pytest.raises(InputError, match=r"256 positions; lower the field limits"):
        finetune(world, pretrained, tmp_path / "c", limits=FieldLimits(12, 16, 500))
    empty = tmp_path / "empty"
    write_table(empty / "judgments" / "train.parquet", "judgments", read_judged(world).slice(0, 0))
    with pytest.raises(InputError, match=r"has no .* judgments"):
        finetune(empty, pretrained, tmp_path / "d")


def read_judged(world: Path):
    return read_table(world / "judgments" / "train.parquet", "judgments")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_training_that_is_refused_leaves_the_one_that_lies_there_as_it_was(world, pretrained, tmp_path):
    out = shutil.copytree(pretrained, tmp_path / "pretrained")
    before = files_of(out)
    knobs = {**SMALL, **LIMITS, "vocabulary": 300, "data": world, "out": out, "held_out": 0.1, "epochs": 2}
    with pytest.raises(InputError, match="a finished training lies here"):
        pretrain_teacher.main(pretrain_teacher.Config(**knobs))
    with pytest.raises(InputError, match="vocabulary was 400, now 300"):
        pretrain_teacher.main(pretrain_teacher.Config(resume=True, **knobs))
    with pytest.raises(InputError, match="a finished training lies here"):
        finetune(world, pretrained, out)
    assert files_of(out) == before


def test_a_decoder_with_another_tokenizer_than_its_own_is_refused(world, pretrained, tmp_path):
    """Its embeddings would meet token ids that mean something else, and the teacher would learn from noise."""
    model = shutil.copytree(pretrained, tmp_path / "pretrained")
    content = json.loads((model / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    first, second = sorted(ids, key=ids.__getitem__)[-2:]
    ids[first], ids[second] = ids[second], ids[first]
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="not the one that its weights were trained with"):
        finetune(world, model, tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


def test_clicks_of_queries_that_are_held_out_for_a_whole_piece_are_passed_over(world, tmp_path):
    clicks = read_table(world / "clicks.parquet", "clicks")
    queries = read_table(world / "judgments" / "dev.parquet", "judgments").column("query")
    rows = 16_384  # of a piece
    barred = clicks.take([0] * rows)
    barred = barred.set_column(0, clicks.schema.field("query"), pa.array([queries[0].as_py()] * rows))
    barred = barred.set_column(1, clicks.schema.field("doc_id"), pa.array([f"d-{row}" for row in range(rows)]))
    shutil.copytree(world / "judgments", tmp_path / "data" / "judgments")
    write_table(tmp_path / "data" / "clicks.parquet", "clicks", [barred, clicks])
    knobs = {**SMALL, **LIMITS, "held_out": 0.1, "epochs": 0.1}
    pretrain_teacher.main(pretrain_teacher.Config(data=tmp_path / "data", out=tmp_path / "out", **knobs))
    assert 0 < ScoreCard.load(tmp_path / "out").metrics["pairs"] < len(clicks)


def test_a_student_is_not_taken_for_a_decoder(world, tmp_path):
    from tests.training.trainer.test_ranking_trainer import make_model

    make_model().save_pretrained(tmp_path / "bert")
    ScoreCard(
        role="student", text_format="cls-query-sep-title-summary-sep", format_version=1, limits=FieldLimits(8, 8, 8),
        head="linear", pooling="cls",
    ).save(tmp_path / "bert")  # fmt: skip
    with pytest.raises(InputError, match="this checkpoint is a student"):
        finetune(world, tmp_path / "bert", tmp_path / "out")
