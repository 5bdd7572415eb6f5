"""A tiny random student checkpoint and a small judged dataset: what build and serving tests are run on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import pyarrow as pa
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertConfig, BertForSequenceClassification

from ranking.card import ScoreCard, fingerprint
from ranking.limits import FieldLimits
from ranking.schema import TABLES, write_table
from ranking.text import FORMAT_VERSION, STUDENT_FORMAT
from training.student.vocabulary import train_repeatably

WORDS = [
    "red", "blue", "green", "fast", "slow", "film", "actor", "story", "night", "river", "king", "queen", "ship", "war",
    "love", "star", "moon", "house", "road", "train", "doctor", "robot", "ghost", "summer", "winter", "island", "city",
    "dream", "secret", "dragon",
]  # fmt: skip


def sentence(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def make_student(folder: Path, role: Literal["student", "baseline"] = "student", seed: int = 0, **sizes) -> Path:
    """A BERT with random weights whose scores have a spread of about 1; 2 layers of 64 unless sizes say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    letters = "abcdefghijklmnopqrstuvwxyz é ü 用户 0123456789"
    tokenizer = train_repeatably(tokenizer, lambda: [*WORDS, letters], vocabulary_size=400)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128} | sizes
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=128, **shape)
    config.num_labels = 1
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):  # as trained ones: no two alike, so that an exporter does not merge them
                weight.normal_(std=0.02)
            if weight.dim() == 2:  # the usual 0.02 leaves every pair with nearly the same score
                weight.mul_(4.0 if "embeddings" in name else 3.0)
        model.classifier.weight.mul_(2.0)
    model.save_pretrained(folder)
    ScoreCard(
        role=role,
        text_format=STUDENT_FORMAT,
        format_version=FORMAT_VERSION,
        limits=FieldLimits(max_query_tokens=8, max_title_tokens=12, max_summary_tokens=40),
        head="linear",
        pooling="cls",
        vocabulary=fingerprint(folder / "tokenizer.json"),
    ).save(folder)
    return folder


def make_judged(folder: Path, queries: int = 12, documents: int = 10, seed: int = 0) -> Path:
    """A dataset folder with dev judgments and candidates of random words."""
    rng = random.Random(seed)
    rows = [
        {
            "query_id": f"q{q:03}",
            "doc_id": f"d{d}",
            "query": query,
            "title": sentence(rng, 1, 5),
            "summary": sentence(rng, 0, 30),
            "grade": rng.randint(0, 2),
        }
        for q in range(queries)
        for query in [sentence(rng, 1, 4)]
        for d in range(documents)
    ]
    (folder / "judgments").mkdir(parents=True, exist_ok=True)
    judged = pa.Table.from_pylist(rows, schema=TABLES["judgments"].schema)
    write_table(folder / "judgments" / "dev.parquet", "judgments", judged)
    write_table(folder / "candidates.parquet", "candidates", judged.drop_columns("grade"))
    return folder
