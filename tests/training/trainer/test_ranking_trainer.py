"""The group-wise trainer on a tiny random model: batches, normalisation, resume, selection, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, set_seed

from ranking.card import CARD_NAME
from ranking.errors import InputError
from ranking.text import EncodedPair
from training.trainer.batch_trainer import begin_run
from training.trainer.group_batches import GroupBatches, RankingGroups, deal, group_rows, sample_up_to
from training.trainer.losses import hinge
from training.trainer.ranking_trainer import RankingTrainer
from training.trainer.token_store import TokenStore, split_by_tokens
from training.trainer.training_settings import TrainingSettings, launched_processes

ROOT = Path(__file__).parents[3]
VOCABULARY = 50
COMPARED = ("loss", "eval_ndcg@5", "grad_norm", "margin", "pair_accuracy", "score_min", "score_max")


def make_groups(queries: int = 12, documents: int = 6, seed: int = 0) -> RankingGroups:
    """Documents of 3 to 20 tokens whose grade is how often token 7 occurs: learnable in a few steps."""
    rng = np.random.default_rng(seed)
    texts, grades, names = [], [], []
    for query in range(queries):
        for _ in range(documents):
            grade = int(rng.integers(0, 4))
            text = rng.integers(10, VOCABULARY, rng.integers(5, 20))
            text[:grade] = 7
            texts.append(rng.permutation(text).tolist())
            grades.append(grade)
            names.append(f"q{query}")
    return RankingGroups.of_rows(names, np.array(grades), TokenStore.build(texts, [2] * len(texts)))


def make_model(seed: int = 3) -> BertForSequenceClassification:
    set_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def make_trainer(out: Path, dev: RankingGroups | None = None, **knobs) -> RankingTrainer:
    defaults = {"epochs": 2, "learning_rate": 1e-3, "batch_groups": 4, "forward_tokens": 100, "precision": "fp32"}
    settings = TrainingSettings(**(defaults | {"log_steps": 1} | knobs))
    sample = sample_up_to(4)
    return RankingTrainer(
        make_model(), settings, make_groups(), dev, loss=partial(hinge, margin=1.0), pad_id=0, out=out,
        token_types=True, sample_group=sample,
    )  # fmt: skip


# 12 queries in batches of 5, 5 and 2; forwards so small that two processes need different numbers of them
UNEVEN = {"dev": make_groups(seed=9), "batch_groups": 5, "forward_tokens": 60, "epochs": 6, "learning_rate": 1e-2}


def losses(trainer: RankingTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_padded_batch_holds_the_documents_and_their_token_types():
    batch = TokenStore.build([[5, 6, 2], [7, 2]], document_starts=[1, 1]).pad([0, 1], pad_id=0, token_types=True)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [0, 1, 0]]


def test_a_store_on_disk_reads_as_one_in_memory(tmp_path):
    texts = [[1, 2, 3], [4], [5, 6]]
    pairs = [EncodedPair(ids, start) for ids, start in zip(texts, [1, 0, 1])]
    mapped = TokenStore.write(tmp_path, [pairs[:2], pairs[2:]])
    assert isinstance(mapped.ids, np.memmap)
    assert [mapped[i].tolist() for i in range(3)] == texts
    assert mapped.document_starts.tolist() == [1, 0, 1]
    assert [mapped.take(np.array([2, 0]))[i].tolist() for i in range(2)] == [[5, 6], [1, 2, 3]]
    assert TokenStore.of_pairs(pairs).take(np.array([2, 0, 1])).document_starts.tolist() == [1, 1, 0]


def test_forwards_hold_every_document_once_within_the_budget_and_nearly_no_padding():
    lengths = np.random.default_rng(0).integers(5, 60, 300)
    chunks = split_by_tokens(lengths, 500)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(300))
    assert all(len(chunk) * lengths[chunk].max() <= 500 for chunk in chunks)
    assert lengths.sum() / sum(len(chunk) * lengths[chunk].max() for chunk in chunks) > 0.9


def test_a_document_longer_than_the_budget_is_encoded_alone():
    assert [chunk.tolist() for chunk in split_by_tokens(np.array([3, 90, 4]), 10)] == [[1], [2, 0]]


def test_rows_in_any_order_become_groups():
    names, order, starts = group_rows(["b", "a", "b", "c", "a"])
    assert names == ["b", "a", "c"] and order.tolist() == [0, 2, 1, 4, 3] and starts.tolist() == [0, 2, 4, 5]


def test_a_target_that_is_not_finite_is_named_before_training():
    store = TokenStore.of_pairs([EncodedPair([1, 2], 1)] * 3)
    with pytest.raises(ValueError, match="targets of document 2 are nan: must be finite"):
        RankingGroups.of_rows(["a", "a", "b"], np.array([1.0, 0.0, np.nan]), store)


def test_sampling_keeps_a_rare_grade():
    targets = np.array([0.0] * 50 + [3.0])
    for seed in range(20):
        rows = sample_up_to(4)(targets, np.random.default_rng(seed))
        assert len(set(rows.tolist())) == 4 and 50 in rows


def test_an_epoch_holds_every_query_once_and_epochs_differ():
    batches = GroupBatches(make_groups(), batch_groups=5, forward_tokens=100, pad_id=0, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        orders.append([batches[i]["groups"].unique().tolist() for i in range(len(batches))])
        assert sorted(chain(*orders[-1])) == list(range(12))
        assert sum(batches[i]["normaliser"] for i in range(len(batches))) == 72
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("process_count", [2, 3, 5])
def test_processes_share_a_batch_by_whole_queries_with_equally_many_forwards(process_count):
    groups = make_groups(queries=4)
    settings = {"batch_groups": 4, "forward_tokens": 40, "pad_id": 0, "seed": 1, "sample_group": sample_up_to(3)}
    whole = GroupBatches(groups, **settings)[0]
    shares = [
        GroupBatches(groups, **settings, process_index=process, process_count=process_count)[0]
        for process in range(process_count)
    ]
    assert len({len(share["forwards"]) for share in shares}) == 1
    assert {share["normaliser"] for share in shares} == {whole["normaliser"]} == {12}
    dealt = [share["groups"].unique().tolist() for share in shares]
    assert sorted(chain(*dealt)) == [0, 1, 2, 3]
    for share in shares:
        assert sum(share["rows"]) == len(share["targets"]) == len(share["groups"])
        assert all(len(f["input_ids"]) >= rows for f, rows in zip(share["forwards"], share["rows"]))


def test_dealing_balances_tokens():
    shares = deal([10, 9, 8, 1, 1, 1], 3)
    assert sorted(chain(*shares)) == list(range(6))
    assert [sum([10, 9, 8, 1, 1, 1][i] for i in share) for share in shares] == [10, 10, 10]


def test_training_learns_keeps_the_best_and_logs_what_ranking_needs(tmp_path):
    dev = make_groups(seed=9)
    trainer = make_trainer(tmp_path, dev, epochs=15, learning_rate=1e-2)
    before = trainer.evaluate()["eval_ndcg@5"]
    trainer.start()
    history = [entry for entry in trainer.state.log_history if "eval_ndcg@5" in entry][1:]
    best = max(entry["eval_ndcg@5"] for entry in history)
    assert best > before + 0.1
    assert trainer.evaluate()["eval_ndcg@5"] == pytest.approx(best)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"margin", "pair_accuracy", "score_min", "score_max", "grad_norm", "learning_rate"} <= set(steps[0])
    assert steps[0]["score_min"] < steps[0]["score_max"]
    assert steps[0]["pair_accuracy"] < 0.7 < steps[-1]["pair_accuracy"] <= 1


def test_curves_ranking_metrics_and_settings_go_to_tensorboard(tmp_path):
    make_trainer(tmp_path, make_groups(seed=9), epochs=1, report_to="tensorboard").start()
    events = list(tmp_path.rglob("events.out.tfevents*"))
    told = events[0].read_bytes()
    for name in (b"train/pair_accuracy", b"eval/ndcg@5", b"settings/forward_tokens"):
        assert name in told


def test_a_tracker_that_is_not_installed_is_named_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"report_to: no-such-tracker is not installed here; there is .*tensorboard"):
        make_trainer(tmp_path, make_groups(seed=9), report_to="tensorboard,no-such-tracker")


def test_early_stopping_ends_training(tmp_path):
    trainer = make_trainer(tmp_path, make_groups(seed=9), epochs=50, learning_rate=1e-12, patience=2)
    trainer.start()
    assert trainer.state.epoch == 3.0  # the first evaluation sets the mark, two more do not pass it


def test_batches_of_documents_do_not_change_scores(tmp_path):
    groups = make_groups(seed=5)
    trainer = make_trainer(tmp_path)
    many = trainer.score(groups)
    trainer.settings.forward_tokens = 1
    assert np.abs(trainer.score(groups) - many).max() < 1e-6


def test_accumulated_batches_give_the_loss_and_gradient_of_one_large_batch(tmp_path):
    """12 queries as 12 or as 3 x 4, and as 5 + 5 + 2: the last batch is smaller and weighs less."""
    results = []
    for name, knobs in {
        "one": {"batch_groups": 12},
        "four": {"batch_groups": 4, "accumulation": 3},
        "uneven": {"batch_groups": 5, "accumulation": 3},
    }.items():
        trainer = make_trainer(tmp_path / name, epochs=3, **knobs)
        trainer.start()
        results.append((losses(trainer), [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=2e-6)
    assert len(results[0][0]) == 3 and results[0][0][0] > 0.1


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    """Stopped in the middle of an epoch: data order, optimiser, schedule and early stopping go on as they were."""
    dev = make_groups(seed=9)
    knobs = {"epochs": 4, "eval_steps": 2, "patience": 9}
    whole = make_trainer(tmp_path / "whole", dev, **knobs)
    whole.start()
    stopped = make_trainer(tmp_path / "parts", dev, **knobs)
    stopped.add_callback(_StopAt(4))
    stopped.start()
    assert stopped.state.global_step == 4
    resumed = make_trainer(tmp_path / "parts", dev, **knobs, resume=True)
    resumed.start()
    assert len(losses(resumed)) == 12
    np.testing.assert_allclose(losses(resumed), losses(whole), rtol=0, atol=1e-6)
    evaluations = [[e["eval_ndcg@5"] for e in t.state.log_history if "eval_ndcg@5" in e] for t in (whole, resumed)]
    assert evaluations[0] == evaluations[1]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings_or_data(tmp_path):
    settings = TrainingSettings(epochs=1, learning_rate=1e-3)
    begin_run(settings, tmp_path, launched_processes(), {"clicks": "1f"})
    begin_run(settings, tmp_path, launched_processes(), {"clicks": "2f"})  # the first attempt has trained nothing
    make_trainer(tmp_path, epochs=1).start()
    with pytest.raises(InputError, match="continue it with --resume"):
        begin_run(settings, tmp_path, launched_processes(), {"clicks": "2f"})
    again = replace(settings, resume=True)
    begin_run(replace(again, log_steps=3), tmp_path, launched_processes(), {"clicks": "2f"})
    with pytest.raises(InputError, match=r"learning_rate was 0\.001, now 0\.5"):
        begin_run(replace(again, learning_rate=0.5), tmp_path, launched_processes(), {"clicks": "2f"})
    with pytest.raises(InputError, match="content of clicks was '2f', now '1f'"):
        begin_run(again, tmp_path, launched_processes(), {"clicks": "1f"})
    with pytest.raises(InputError, match="no run to resume"):
        begin_run(again, tmp_path / "elsewhere", launched_processes(), {})


def test_a_finished_run_is_not_trained_over_without_its_states(tmp_path):
    settings = TrainingSettings()
    begin_run(settings, tmp_path, launched_processes(), {})
    (tmp_path / CARD_NAME).write_text("{}")
    with pytest.raises(InputError, match="a finished training lies here already"):
        begin_run(settings, tmp_path, launched_processes(), {})
    with pytest.raises(InputError, match="has finished without a checkpoint"):
        begin_run(replace(settings, resume=True), tmp_path, launched_processes(), {})
    state = tmp_path / "training" / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text("{}")
    # killed before its caller knew that it had finished
    begin_run(replace(settings, resume=True), tmp_path, launched_processes(), {})


def test_a_run_that_stopped_early_is_not_trained_on(tmp_path):
    knobs = {"dev": make_groups(seed=9), "epochs": 50, "learning_rate": 1e-2, "patience": 1}
    stopped = make_trainer(tmp_path, **knobs)
    stopped.start()
    assert stopped.state.epoch < 50
    resumed = make_trainer(tmp_path, **knobs, resume=True)
    resumed.start()
    assert resumed.state.global_step == stopped.state.global_step
    for name, weight in stopped.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}: a whole number from 0"):
        TrainingSettings(seed=seed)


def test_a_diverged_model_stops_with_a_reason(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        trainer.score(make_groups())


def test_two_processes_get_the_losses_of_one(tmp_path):
    """Same global batches over DDP (gloo). Adam hides a wrong scale of the gradient, so its norm is compared too."""
    single = make_trainer(tmp_path / "single", **UNEVEN)
    single.start()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", __file__]
    run = subprocess.run([*command, str(tmp_path)], env=environment, timeout=240, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    double, one = json.loads((tmp_path / "double.json").read_text()), curves(single)
    assert double.pop("process_count") == 2
    # a shift of all scores costs a pairwise loss nothing: the bias drifts with rounding, the range does not
    for figures in (double, one):
        figures["range"] = np.subtract(figures.pop("score_max"), figures.pop("score_min"))
    for name in one:
        np.testing.assert_allclose(double[name], one[name], atol=2e-5, err_msg=name)
    assert one["loss"][-1] < 0.9 * one["loss"][0]


def curves(trainer: RankingTrainer) -> dict:
    history = trainer.state.log_history
    return {name: [entry[name] for entry in history if name in entry] for name in COMPARED}


class _StopAt:
    def __new__(cls, step: int):
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop |= state.global_step == step

        return Stop()


def _second_process_main(out: Path) -> None:
    trainer = make_trainer(out / "double", **UNEVEN)
    trainer.start()
    if trainer.args.process_index == 0:
        result = curves(trainer) | {"process_count": trainer.args.world_size}
        (out / "double.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _second_process_main(Path(sys.argv[1]))
