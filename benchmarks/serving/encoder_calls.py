"""How many encoder calls a list of real documents takes, how much of them is padding, and what tokenising costs.

    python -m benchmarks.serving.encoder_calls --data data/msrd

Nothing is encoded: the front's own code cuts the lists into calls, with the settings of a CPU, of a GPU with length
buckets, and of a GPU with packed lists. `--settings.call_tokens 128` and so on add a row of your own.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.serving.rerank_lists import RerankList, make_checkpoint, read_lists
from build.triton_config import ServingLimits, Target, bucket_lengths
from ranking.program import run
from ranking.text import StudentFormat
from serving.front.buckets import cut, fill
from serving.front.field_cache import FieldCache


@dataclass
class Config:
    """Count encoder calls and padding on real lists.

    Args:
        data: dataset folder with test judgments
        lists: how many lists
        documents: documents of a list
        settings: TensorRT settings of one more row
    """

    data: Path
    lists: int = 100
    documents: int = 48
    settings: ServingLimits = field(default_factory=ServingLimits)


def main(config: Config) -> None:
    """Print one JSON object per layout, and the processor time of tokenising a list."""
    with tempfile.TemporaryDirectory() as folder:
        text = StudentFormat.of_checkpoint(make_checkpoint("minilm", Path(folder) / "checkpoint"))
    lists = read_lists(config.data, text, config.lists, config.documents)
    pairs = [text.encode_together([each.query] * len(each.titles), each.titles, each.summaries) for each in lists]
    lengths = [of_list.lengths.tolist() for of_list in pairs]
    small = ServingLimits(max_batch=64, batch_tokens=4096, call_tokens=128)
    rows = {
        "buckets, calls of a CPU": small,
        "buckets, calls of a GPU": ServingLimits(),
        "packed": ServingLimits(graph="packed"),
        "given settings": config.settings,
    }
    for name, limits in rows.items():
        print(json.dumps({"layout": name, **count_calls(lengths, limits, text.max_tokens())}))
    print(json.dumps({"tokens of a pair, median": float(np.median(np.concatenate(lengths)))}))
    for documents, milliseconds in tokenising(text, lists).items():
        print(json.dumps({"documents of the list": documents, "tokenising it, ms of one core": round(milliseconds, 2)}))


def tokenising(text: StudentFormat, lists: Sequence[RerankList]) -> dict[str, float]:
    """Processor milliseconds of a list's tokens, made as a front makes them: of documents new to it, and of known ones.

    Every query is new. text: left with a cache of all fields.
    """

    def milliseconds(query: str) -> float:
        started = time.process_time()
        for each in lists:
            text.encode_together([query.format(each.query)] * len(each.titles), each.titles, each.summaries)
        return (time.process_time() - started) / len(lists) * 1e3

    text.field_ids = FieldCache(text.tokenise_fields, 0)
    new = milliseconds("{}")
    text.field_ids = FieldCache(text.tokenise_fields, 4 * sum(len(each.titles) for each in lists))
    milliseconds("{}")
    return {"new": new, "seen before": milliseconds("{} again")}


def count_calls(
    lists: Sequence[Sequence[int]], limits: ServingLimits, longest: int, target: Target = "tensorrt"
) -> dict[str, float]:
    """Calls a list, and encoded tokens over real ones. lists: tokens of each pair; longest: of the longest pair."""
    limits = limits.for_target(target)
    edges = bucket_lengths(limits, target, longest)
    calls_of = packed_calls if limits.graph == "packed" else padded_calls
    calls = [calls_of(lengths, edges, limits) for lengths in lists]
    real = sum(map(sum, lists))
    return {
        "calls a list": round(float(np.mean([len(sizes) for sizes in calls])), 2),
        "encoded tokens over real": round(sum(map(sum, calls)) / real, 3),
    }


def padded_calls(lengths: Sequence[int], edges: Sequence[int], limits: ServingLimits) -> list[int]:
    """Tokens of each call, padding included."""
    buckets = cut(lengths, edges, limits.max_batch, limits.batch_tokens, limits.call_tokens)
    return [len(bucket.rows) * bucket.length for bucket in buckets]


def packed_calls(lengths: Sequence[int], edges: Sequence[int], limits: ServingLimits) -> list[int]:
    """Tokens of each call, which are all real."""
    return [sum(lengths[row] for row in rows) for rows in fill(lengths, limits.max_batch, limits.batch_tokens)]


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.serving.encoder_calls --data data/msrd")
