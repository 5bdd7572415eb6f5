"""Pairs per second of the group-wise teacher step beside TRL's RewardTrainer, all else being equal.

    python -m benchmarks.teacher.training_step --data data/world

Both learn the same pairs of the same groups with -log sigmoid(s+ - s-), which TRL calls the reward loss and we
RankNet's. TRL encodes both documents of every pair; the group-wise step encodes each document of a group once. Rounds
alternate, so that a busy machine slows both; processor time is reported beside wall time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainerCallback, set_seed
from trl import RewardConfig, RewardTrainer

from ranking.limits import DEFAULT_LIMITS
from ranking.program import run
from ranking.schema import read_table
from training.teacher.decoder import build_decoder, save_tokenizer, train_bpe
from training.teacher.score_head import install_pooling
from training.trainer.attention import fastest_attention
from training.trainer.group_batches import RankingGroups, sample_up_to
from training.trainer.losses import ranknet
from training.trainer.ranking_trainer import RankingTrainer
from training.trainer.token_store import TokenStore
from training.trainer.training_settings import TrainingSettings

WARM_UP_STEPS = 2


@dataclass
class Config:
    """Compare the group-wise teacher step with TRL's RewardTrainer.

    Args:
        data: dataset folder with judgments/train.parquet
        size: decoder size, see docs/teacher.md
        group_size: documents per query and step
        queries: judged queries used
        batch_groups: queries per group-wise step; TRL's batches hold as many texts: half as many pairs
        steps: timed steps of each trainer and round
        rounds: alternations
        precision: fp32 or bf16 autocast, for both
        threads: PyTorch threads
        out: JSON file to write as well
    """

    data: Path
    size: str = "3M"
    group_size: int = 8
    queries: int = 128
    batch_groups: int = 16
    steps: int = 8
    rounds: int = 3
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: int = 2
    out: Path | None = None


@dataclass
class Timing:
    """One trainer's timed steps: pairs learned, texts encoded, wall and processor seconds."""

    pairs: int
    texts: int
    wall: float
    processor: float


class StopWatch(TrainerCallback):
    """Times the steps after the warm-up and stops the trainer."""

    def __init__(self, steps: int):
        self.last = WARM_UP_STEPS + steps

    def on_step_end(self, args, state, control, **_):
        """Start the clocks after the warm-up; stop them and the trainer after the last step."""
        if state.global_step == WARM_UP_STEPS:
            self.wall, self.processor = time.perf_counter(), time.process_time()
        if state.global_step == self.last:
            self.wall = time.perf_counter() - self.wall
            self.processor = time.process_time() - self.processor
            control.should_training_stop = True


def main(config: Config) -> None:
    """Time both trainers in alternating rounds and report the medians."""
    torch.set_num_threads(config.threads)
    rows = read_table(config.data / "judgments" / "train.parquet", "judgments")
    fields = [rows.column(name).to_pylist() for name in ("query", "title", "summary")]
    tokenizer = train_bpe([(fields[0], fields[1], fields[2])], 3000)
    with tempfile.TemporaryDirectory() as folder:
        text_format = save_tokenizer(tokenizer, Path(folder) / "tokenizer", DEFAULT_LIMITS, None)
        texts = TokenStore.of_pairs(text_format.encode(fields[0], fields[1], fields[2]))
        groups = sampled_groups(rows.column("query_id").to_pylist(), rows.column("grade").to_numpy(), texts, config)
        model_folder = Path(folder) / "decoder"
        set_seed(1)
        build_decoder(config.size, tokenizer, text_format.max_tokens()).save_pretrained(model_folder)
        pairs = pairs_of(groups)
        group_wise, reward = [], []
        for turn in range(config.rounds):
            group_wise.append(time_group_wise(config, model_folder, tokenizer, groups, Path(folder) / f"ours-{turn}"))
            reward.append(time_trl(config, model_folder, tokenizer, groups, pairs, Path(folder) / f"trl-{turn}"))
    report(config, group_wise, reward, len(pairs) / len(groups))


def sampled_groups(query_ids: list[str], grades: np.ndarray, texts: TokenStore, config: Config) -> RankingGroups:
    """group_size documents of each of the first queries, drawn once, so that both trainers have the same pairs."""
    everything = RankingGroups.of_rows(query_ids, grades, texts)
    rng, sample = np.random.default_rng(0), sample_up_to(config.group_size)
    rows, names = [], []
    for query in range(min(config.queries, len(everything))):
        start, end = everything.group_starts[query], everything.group_starts[query + 1]
        for row in start + sample(everything.targets[start:end], rng):
            rows.append(row)
            names.append(everything.query_ids[query])
    return RankingGroups.of_rows(names, everything.targets[rows], everything.store.take(np.array(rows)))


def pairs_of(groups: RankingGroups) -> list[tuple[int, int]]:
    """(better, worse) documents: every pair of a query with different grades."""
    of_document = groups.group_of_document()
    usable = (of_document[:, None] == of_document) & (groups.targets[:, None] > groups.targets)
    return [(int(better), int(worse)) for better, worse in np.argwhere(usable)]


def load(folder: Path, tokenizer: Any) -> Any:
    """The start of both trainers: the decoder with a new head, drawn from the same seed each time."""
    set_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    fastest_attention(model, 128)
    return model


def time_group_wise(config: Config, folder: Path, tokenizer: Any, groups: RankingGroups, out: Path) -> Timing:
    """Time steps of our group-wise trainer."""
    settings = TrainingSettings(
        epochs=1e6, batch_groups=config.batch_groups, precision=config.precision, log_steps=10**6, eval_steps=10**6
    )  # fmt: skip
    model = load(folder, tokenizer)
    install_pooling(model, "last_token")
    trainer = RankingTrainer(model, settings, groups, None, loss=ranknet, pad_id=tokenizer.pad_token_id, out=out)
    counted = {"pairs": 0, "texts": 0}
    batches, watch = trainer.batches, StopWatch(config.steps)
    per_batch = [counts(batches[i]) for i in range(len(batches))]
    trainer.add_callback(watch)
    epochs(trainer, watch)
    # every epoch holds all groups: the mean batch stands for the timed ones
    for key in counted:
        counted[key] = round(config.steps * statistics.mean(c[key] for c in per_batch))
    return Timing(**counted, wall=watch.wall, processor=watch.processor)


def counts(batch: dict[str, Any]) -> dict[str, int]:
    """Pairs and texts of one group-wise batch."""
    targets, of_document = batch["targets"], batch["groups"]
    usable = (of_document[:, None] == of_document) & (targets[:, None] > targets)
    return {"pairs": int(usable.sum()), "texts": len(targets)}


def time_trl(
    config: Config, folder: Path, tokenizer: Any, groups: RankingGroups, pairs: list[tuple[int, int]], out: Path
) -> Timing:
    """Time steps of TRL's RewardTrainer on the pairs of the same groups."""
    batch = config.batch_groups * config.group_size // 2
    data = Dataset.from_dict(
        {
            "chosen_ids": [groups.store[better].tolist() for better, _ in pairs],
            "rejected_ids": [groups.store[worse].tolist() for _, worse in pairs],
        }
    )
    arguments = RewardConfig(
        output_dir=str(out), per_device_train_batch_size=batch, max_steps=WARM_UP_STEPS + config.steps,
        report_to="none",
        bf16=config.precision == "bf16", use_cpu=not torch.accelerator.is_available(), optim="adamw_torch_fused",
        gradient_checkpointing=False, max_length=None, logging_steps=10**6, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(load(folder, tokenizer), arguments, train_dataset=data, processing_class=tokenizer)
    watch = StopWatch(config.steps)
    trainer.add_callback(watch)
    epochs(trainer, watch)
    return Timing(config.steps * batch, 2 * config.steps * batch, watch.wall, watch.processor)


def epochs(trainer: Any, watch: StopWatch) -> None:
    """Run a trainer until its stopwatch ends it."""
    run_training: Callable[[], Any] = trainer.start if isinstance(trainer, RankingTrainer) else trainer.train
    run_training()
    assert trainer.state.global_step == watch.last, "the data ended before the timed steps did"


def report(config: Config, group_wise: list[Timing], reward: list[Timing], pairs_per_query: float) -> None:
    """Print the medians over the rounds and, where the settings name a file, write them as JSON."""
    print(
        f"{config.size} decoder, groups of {config.group_size}, {pairs_per_query:.1f} pairs a query, {config.precision}"
    )
    print("| trainer | pairs/s | texts/s | pairs per processor second |")
    print("|---|---|---|---|")
    speeds = {}
    for name, timings in (("TRL RewardTrainer", reward), ("group-wise step", group_wise)):
        speeds[name] = {
            "pairs_per_second": statistics.median(t.pairs / t.wall for t in timings),
            "texts_per_second": statistics.median(t.texts / t.wall for t in timings),
            "pairs_per_processor_second": statistics.median(t.pairs / t.processor for t in timings),
        }
        print("| " + " | ".join([name, *(f"{value:.0f}" for value in speeds[name].values())]) + " |")
    ours, theirs = speeds["group-wise step"], speeds["TRL RewardTrainer"]
    ratios = {key: ours[key] / theirs[key] for key in ours}
    by_processor = ratios["pairs_per_processor_second"]
    print(f"ratio: {ratios['pairs_per_second']:.1f} times the pairs/s ({by_processor:.1f} by processor time)")
    if config.out is not None:
        content = {"config": asdict(config), "speeds": speeds, "ratios": ratios, "pairs_per_query": pairs_per_query}
        config.out.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.teacher.training_step --data data/world")
