"""What a pre-trained decoder already knows of relevance: how much likelier a query makes a document.

    evidence = log p(title, summary | query) - log p(title, summary | no query)

The second term takes out what makes any document likely, its length above all (pointwise mutual information; for
language models, Holtzman et al., arXiv 2104.08315). Stage 1 learns the first from clicks, so the evidence orders
documents before anyone has judged one. It takes two passes with a vocabulary of logits at every token, and a server
gives no such score: `finetune_teacher --loss likelihood` teaches it to the state of the end-of-sequence token instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import reduce
from torch.nn import functional
from tqdm import tqdm

from ranking.errors import DataError, InputError
from ranking.schema import iter_table
from ranking.telemetry import bars_are_read
from ranking.text import TeacherFormat
from training.teacher.decoder import open_decoder
from training.trainer.attention import exact_attention
from training.trainer.group_batches import RankingGroups
from training.trainer.token_store import TokenStore, split_by_tokens
from training.trainer.training_settings import launched_processes


def evidence_groups(
    model: str, text_format: TeacherFormat, pad_id: int, rows: pa.Table, *, bf16: bool, forward_tokens: int
) -> RankingGroups:
    """Candidates grouped by query, targets the evidence of a pre-trained decoder in standard deviations.

    model: folder or hub id; rows: a table of candidates; bf16: autocast; forward_tokens: padded tokens of one forward.
    InputError if the evidence tells no document from another.
    """
    texts = (rows.column(name).to_pylist() for name in ("query", "title", "summary"))
    decoder = open_decoder(model)
    exact_attention(decoder)
    given, found = evidence(decoder, text_format, pad_id, *texts, bf16=bf16, forward_tokens=forward_tokens)
    if not (np.isfinite(found).all() and found.std() > 0):
        raise InputError(f"{model}: its likelihoods tell no document from another")
    return RankingGroups.of_rows(rows.column("query_id").to_pylist(), found / found.std(), given)


def evidence(
    decoder: Any,
    text_format: TeacherFormat,
    pad_id: int,
    queries: Sequence[str],
    titles: Sequence[str],
    summaries: Sequence[str],
    *,
    bf16: bool = False,
    forward_tokens: int = 4096,
) -> tuple[TokenStore, np.ndarray]:
    """(token ids of the pairs, the evidence of each: float32 [pairs], in nats)."""
    given = TokenStore.of_pairs(text_format.encode(queries, titles, summaries))
    alone = TokenStore.of_pairs(text_format.encode([""] * len(queries), titles, summaries))
    likelihoods = (
        log_likelihood(decoder, texts, pad_id, bf16=bf16, forward_tokens=forward_tokens) for texts in (given, alone)
    )
    return given, next(likelihoods) - next(likelihoods)


@torch.no_grad()
def log_likelihood(
    decoder: Any, texts: TokenStore, pad_id: int, *, bf16: bool = False, forward_tokens: int = 4096
) -> np.ndarray:
    """float32 [texts]: log p(document | query), of each text's tokens from its document start to its end.

    Computed by all processes together, the same on each; each has a whole decoder on its device.
    """
    assert texts.document_starts is not None, "a likelihood needs to know where the document begins"
    state = launched_processes()
    decoder = decoder.to(state.device).eval()
    found = torch.zeros(len(texts), device=state.device)
    mine = split_by_tokens(texts.lengths, forward_tokens)[state.process_index :: state.num_processes]
    for rows in tqdm(mine, desc="likelihood", leave=False, disable=not (bars_are_read() and state.is_main_process)):
        batch = texts.pad(rows.tolist(), pad_id, token_types=True)
        ids, mask, types = (batch[k].to(state.device) for k in ("input_ids", "attention_mask", "token_type_ids"))
        with torch.autocast(state.device.type, torch.bfloat16, enabled=bf16):
            logits = decoder(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        predicted = types[:, 1:].bool()
        losses = torch.zeros(predicted.shape, device=state.device)
        losses[predicted] = functional.cross_entropy(logits[predicted].float(), ids[:, 1:][predicted], reduction="none")
        found[torch.from_numpy(rows)] = -losses.sum(1)
    together: Any = reduce(found, "sum")
    return together.cpu().numpy()


def sample_groups(candidates: Path, queries: int, documents: int, seed: int) -> pa.Table:
    """Random queries of a candidates table with at most `documents` random documents of each; 0 for all.

    Queries with one document are left out: there is nothing to compare. Read in pieces; memory is that of the sample.
    The same for the same seed, whatever the order of the rows. InputError if nothing is left; DataError: a pair stands
    twice.
    """
    kept: pa.Table | None = None
    for piece in iter_table(candidates, "candidates"):
        numbered = piece.append_column("number", _numbers(piece.column("query_id"), seed))
        kept = numbered if kept is None else pa.concat_tables([kept, numbered])
        # twice as many as wanted, since some will have one document
        numbers = pc.unique(kept.column("number")).sort()
        if queries and len(numbers) > 2 * queries:
            kept = kept.filter(pc.less(kept.column("number"), numbers[2 * queries]))
    if kept is None:
        raise InputError(f"{candidates}: no candidate")
    kept = kept.sort_by([("number", "ascending"), ("query_id", "ascending"), ("doc_id", "ascending")])
    query_ids, doc_ids = (kept.column(name).to_numpy() for name in ("query_id", "doc_id"))
    twice = np.flatnonzero((query_ids[1:] == query_ids[:-1]) & (doc_ids[1:] == doc_ids[:-1]))
    if len(twice):
        raise DataError(candidates, f"query {query_ids[twice[0]]!r} has document {doc_ids[twice[0]]!r} twice")
    _, first, sizes = np.unique(query_ids, return_index=True, return_counts=True)
    several = np.flatnonzero(sizes > 1)
    if not len(several):
        raise InputError(f"{candidates}: no query with two candidates")
    chosen = np.sort(several[np.argsort(first[several])][: queries or None])
    rng = np.random.default_rng(seed)
    drawn = [first[query] + np.sort(rng.permutation(sizes[query])[: documents or None]) for query in chosen]
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
