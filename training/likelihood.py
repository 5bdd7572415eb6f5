"""What a pre-trained decoder already knows of relevance: how much likelier a query makes a document.

    evidence = log p(title, summary | query) - log p(title, summary | no query)

The second term takes out what makes any document likely, its length above all (pointwise mutual information; for language
models, Holtzman et al., arXiv 2104.08315). Stage 1 learns the first from clicks, so the evidence orders documents before
anyone has judged one. It takes two passes with a vocabulary of logits at every token, and a server gives no such score:
`finetune_teacher --loss likelihood` teaches it to the state of the end-of-sequence token instead.
"""

from __future__ import annotations

import logging
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.nn import functional
from tqdm import tqdm

from ranking.card import CARD_NAME, ScoreCard
from ranking.errors import InputError
from ranking.schema import iter_table
from ranking.text import TeacherFormat
from training.decoder import encode_pairs, open_decoder
from training.group_batches import RankingGroups
from training.token_store import TokenStore, split_by_tokens

log = logging.getLogger(__name__)

FORWARD_TOKENS = 8192


def evidence_groups(model: str, layout: TeacherFormat, pad_id: int, rows: pa.Table, *, bf16: bool) -> RankingGroups:
    """Candidates grouped by query, targets the evidence of a pre-trained decoder in standard deviations.

    model: folder or hub id; rows: a table of candidates; bf16: autocast. InputError if the model is a teacher, which has
    unlearnt to predict, or if its evidence tells no document from another.
    """
    if (Path(model) / CARD_NAME).is_file():
        ScoreCard.load(model).require(model, "pretrained")
    queries, titles, summaries = (rows.column(name).to_pylist() for name in ("query", "title", "summary"))
    decoder = open_decoder(model)
    given = TokenStore.build(*encode_pairs(layout, queries, titles, summaries))
    alone = TokenStore.build(*encode_pairs(layout, [""] * len(queries), titles, summaries))
    found = log_likelihood(decoder, given, pad_id, bf16) - log_likelihood(decoder, alone, pad_id, bf16)
    if not (np.isfinite(found).all() and found.std() > 0):
        raise InputError(f"{model}: its likelihoods tell no document from another")
    texts = [given[row] for row in range(len(given))]
    return RankingGroups.of_rows(rows.column("query_id").to_pylist(), found / found.std(), texts, given.marks)


@torch.no_grad()
def log_likelihood(decoder: Any, texts: TokenStore, pad_id: int, bf16: bool = False) -> np.ndarray:
    """float64 [texts]: log p(second part | first part), the second part from each text's mark to its end.

    Computed by all processes together, the same on each; the decoder stays on this process's device.
    """
    assert texts.marks is not None, "a likelihood needs to know where the document begins"
    state = PartialState()
    decoder = decoder.to(state.device).eval()
    found = torch.zeros(len(texts), dtype=torch.float64, device=state.device)
    mine = split_by_tokens(texts.lengths, FORWARD_TOKENS)[state.process_index :: state.num_processes]
    for rows in tqdm(mine, desc="likelihood", leave=False, disable=not state.is_main_process):
        batch = texts.pad(rows.tolist(), pad_id, token_types=True)
        ids, mask, types = (batch[k].to(state.device) for k in ("input_ids", "attention_mask", "token_type_ids"))
        with torch.autocast(state.device.type, torch.bfloat16, enabled=bf16):
            logits = decoder(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        predicted = types[:, 1:].bool()
        losses = logits.new_zeros(predicted.shape, dtype=torch.float64)
        losses[predicted] = functional.cross_entropy(
            logits[predicted].float(), ids[:, 1:][predicted], reduction="none"
        ).double()
        found[torch.from_numpy(rows)] = -losses.sum(1)
    together: Any = reduce(found, "sum")
    return together.cpu().numpy()


def sample_groups(candidates: Path, queries: int, documents: int, seed: int) -> pa.Table:
    """Random queries of a candidates table with at most `documents` random documents of each; 0 for all.

    Read in pieces; memory is that of the sample. The same for the same seed, whatever the order of the rows.
    """
    kept: pa.Table | None = None
    for piece in iter_table(candidates, "candidates"):
        numbered = piece.append_column("number", _numbers(piece.column("query_id"), seed))
        kept = numbered if kept is None else pa.concat_tables([kept, numbered])
        numbers = pc.unique(kept.column("number")).sort()
        if queries and len(numbers) > queries:
            kept = kept.filter(pc.less(kept.column("number"), numbers[queries]))
    if kept is None or not len(kept):
        raise InputError(f"{candidates}: no candidate")
    kept = kept.sort_by([("number", "ascending"), ("query_id", "ascending"), ("doc_id", "ascending")])
    _, first, sizes = np.unique(kept.column("query_id").to_numpy(), return_index=True, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = [start + np.sort(rng.permutation(size)[: documents or None]) for start, size in zip(first, sizes)]
    return kept.drop_columns("number").take(np.concatenate(drawn))


def _numbers(query_ids: pa.ChunkedArray, seed: int) -> pa.Array:
    """A number for each query id that looks random and depends on the id and the seed alone."""
    distinct = query_ids.unique()
    salt = seed.to_bytes(8, "little", signed=True)
    numbers = [
        int.from_bytes(blake2b(text.encode(), digest_size=8, salt=salt).digest(), "little")
        for text in distinct.to_pylist()
    ]
    return pa.array(numbers, pa.uint64()).take(pc.index_in(query_ids, value_set=distinct))
