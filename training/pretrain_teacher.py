"""Stage 1: continued pre-training of a decoder on clicks, from query to clicked document (docs/teacher.md).

python -m training.pretrain_teacher --data data/world --from-scratch 3M --out runs/pretrained
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zlib import crc32

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import set_seed

from ranking.card import ScoreCard, fingerprint, model_name
from ranking.errors import InputError
from ranking.limits import DEFAULT_LIMITS, FieldLimits
from ranking.object_store import hand_over
from ranking.program import run
from ranking.schema import iter_table
from ranking.telemetry import bars_are_read
from ranking.text import FORMAT_VERSION, TEACHER_FORMAT, EncodedPair, TeacherFormat
from training.sources.held_out import held_out_files, outside_held_out
from training.teacher.decoder import (
    build_decoder,
    open_decoder,
    open_tokenizer,
    padding_id,
    read_tokenizer,
    share_tokenizer,
    train_bpe,
)
from training.teacher.language_trainer import LanguageTrainer
from training.trainer.attention import fastest_attention
from training.trainer.batch_trainer import begin_run, fingerprints
from training.trainer.text_batches import TextBatches
from training.trainer.token_store import TokenStore
from training.trainer.training_settings import RUN_FOLDER, TrainingSettings, launched_processes

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Config(TrainingSettings):
    """Continue a decoder's pre-training on clicks: query in, clicked title and summary out.

    Args:
        data: dataset folder with clicks.parquet
        out: checkpoint folder to write
        model: decoder to start from, a folder or hub id; leave out with from_scratch
        from_scratch: size of a decoder with random weights: 1M, 3M, 10M, 30M or 100M; for machines without a hub
        vocabulary: BPE tokens of a decoder from scratch
        limits: tokens of each field that the teacher reads; they go into the score card and hold for all later stages
        click_weights: weight each pair's loss by log(1 + click weight), so that often clicked documents count more
        held_out: share of the queries kept aside to measure perplexity
        queries: clicked; or document, without a click log's knowledge: the query is one to three words of the document
            itself
        click_share: share of the clicked pairs to train on, drawn at random; lower it where time is short
    """

    data: Path
    out: Path
    model: str = ""
    from_scratch: str = ""
    vocabulary: int = 8000
    limits: FieldLimits = DEFAULT_LIMITS
    click_weights: bool = False
    held_out: float = 0.02
    queries: Literal["clicked", "document"] = "clicked"
    click_share: float = 1.0
    epochs: float = 1.0
    batch_groups: int = 64

    def __post_init__(self):
        super().__post_init__()
        if bool(self.model) == bool(self.from_scratch):
            raise ValueError("give either model or from_scratch")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}: a share between 0 and 1 is needed")
        if not 0 < self.click_share <= 1:
            raise ValueError(f"click_share is {self.click_share}: a share above 0, at most 1 is needed")


def main(config: Config) -> None:
    """Pre-train the decoder that the settings describe and write its checkpoint."""
    set_seed(config.seed)
    clicks = config.data / "clicks.parquet"
    state = launched_processes()
    held_out = {f"{path.stem} judgments": path for path in held_out_files(config.data)}
    read = fingerprints({"clicks": clicks, **held_out})
    begin_run(config, config.out, state, read)
    config.out.mkdir(parents=True, exist_ok=True)
    # one process trains the vocabulary, the others read it
    if state.is_main_process:
        _train_vocabulary(config, clicks)
    hand_over(config.out, state.is_main_process, state.wait_for_everyone)
    tokenizer = open_tokenizer(config.model) if config.model else read_tokenizer(config.out)
    model = open_decoder(config.model) if config.model else None
    positions = None if model is None else getattr(model.config.get_text_config(), "max_position_embeddings", None)
    text_format = share_tokenizer(tokenizer, config.out, config.limits, positions, state)
    if model is None:
        model = build_decoder(config.from_scratch, tokenizer, text_format.max_tokens())
    model.config.get_text_config().pad_token_id = padding_id(tokenizer)
    fastest_attention(model, text_format.max_tokens())

    tokens = config.out / RUN_FOLDER / f".tokens-{state.process_index}"  # hidden: of no use elsewhere
    train, weights, dev = _encode(config, clicks, text_format, tokens)
    batches = TextBatches(
        train,
        weights,
        batch_texts=config.batch_groups,
        forward_tokens=config.forward_tokens,
        pad_id=padding_id(tokenizer),
        seed=config.seed,
    )
    trainer = LanguageTrainer(model, config, batches, dev, config.out)
    LOGGER.info(
        "%d pairs to train on (%d tokens, %.1f%% of all positions real), %d held out; %d parameters",
        len(train), len(train.ids), 100 * batches.real_share(), len(dev), sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    trainer.start()
    metrics = trainer.evaluate()
    trainer.save_checkpoint(
        ScoreCard(
            role="pretrained",
            text_format=TEACHER_FORMAT,
            format_version=FORMAT_VERSION,
            limits=config.limits,
            head="none",
            pooling="last_token",
            vocabulary=fingerprint(config.out / "tokenizer.json"),
            base_model=model_name(config.model) if config.model else f"from scratch {config.from_scratch}",
            trained_on={"clicks" if config.queries == "clicked" else "clicked documents": read["clicks"]},
            metrics={
                "perplexity": metrics["eval_perplexity"],
                "real_token_share": batches.real_share(),
                "pairs": float(len(train)),
            },
        )
    )
    shutil.rmtree(tokens, ignore_errors=True)
    if state.is_main_process:
        LOGGER.info("held-out perplexity %.2f; checkpoint in %s", metrics["eval_perplexity"], config.out)


def _train_vocabulary(config: Config, clicks: Path) -> None:
    """Train and keep the vocabulary, where the model brings none and the run that is resumed has not made it."""
    made = config.out / "tokenizer.json"
    if config.model or (config.resume and made.is_file()):
        return
    made.unlink(missing_ok=True)  # of an attempt with other settings: killed now, this run must not go on with it
    texts = (_texts(piece) for piece in _pieces(clicks, config.data))
    train_bpe(texts, config.vocabulary).save_pretrained(config.out)


def own_words(document: str, draw: np.random.Generator) -> str:
    """One to three words of a document as if they were its query; a document without a word has an empty query."""
    words = [word for word in document.split() if len(word) > 3] or document.split()
    return " ".join(words[i] for i in sorted(draw.integers(0, len(words), draw.integers(1, 4)))) if words else ""


def _pieces(clicks: Path, data: Path) -> Iterator[pa.Table]:
    return outside_held_out(iter_table(clicks, "clicks", batch_rows=16384), data)


def _texts(piece: pa.Table) -> tuple[list[str], list[str], list[str]]:
    query, title, summary = (piece.column(name).to_pylist() for name in ("query", "title", "summary"))
    return query, title, summary


def _encode(
    config: Config, clicks: Path, text_format: TeacherFormat, folder: Path
) -> tuple[TokenStore, np.ndarray | None, TokenStore]:
    """(train texts mapped from disk, their weights, held-out texts). A hash of the query decides what is held out."""
    weights: list[np.ndarray] = []
    held_out: list[EncodedPair] = []
    draw = np.random.default_rng(config.seed)

    def train_pieces() -> Iterator[list[EncodedPair]]:
        pieces = _pieces(clicks, config.data)
        for piece in tqdm(pieces, desc="tokenise", unit="piece", leave=False, disable=not bars_are_read()):
            queries, titles, summaries = _texts(piece)
            # a piece can be without a row, and NumPy would take no flags for floats
            flags = (crc32(query.encode()) % 10_000 < 10_000 * config.held_out for query in queries)
            held = np.fromiter(flags, bool, len(queries))
            if config.queries == "document":
                queries = [own_words(f"{title} {summary}", draw) for title, summary in zip(titles, summaries)]
            pairs = text_format.encode(queries, titles, summaries)
            held_out.extend(pairs[i] for i in np.flatnonzero(held))
            kept = np.flatnonzero(~held & (draw.random(len(held)) < config.click_share))
            weights.append(np.log1p(piece.column("weight").to_numpy()[kept]).astype(np.float32))
            yield [pairs[i] for i in kept]

    train = TokenStore.write(folder, train_pieces())
    if not len(train) or not held_out:
        raise InputError(
            f"{clicks}: {len(train)} pairs to train on and {len(held_out)} held out: both are needed; --held-out is "
            "the share of the queries that is held out"
        )
    return train, np.concatenate(weights) if config.click_weights else None, TokenStore.of_pairs(held_out)


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python -m training.pretrain_teacher --data data/world --from-scratch 3M --out runs/pretrained",
    )
