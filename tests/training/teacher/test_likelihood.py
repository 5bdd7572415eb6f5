"""What a decoder's likelihood says of documents: against a plain computation, and how candidates are drawn for it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ranking.errors import DataError, InputError
from ranking.limits import FieldLimits
from ranking.schema import iter_table, read_table, write_table
from training.teacher.decoder import save_tokenizer, train_bpe
from training.teacher.likelihood import evidence_groups, log_likelihood, sample_groups
from training.trainer.token_store import TokenStore


@pytest.fixture(scope="module")
def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, max_position_embeddings=64, initializer_range=0.5, **shape)
    ).eval()


@torch.no_grad()
def plain(decoder: LlamaForCausalLM, text: list[int], start: int) -> float:
    """The chain rule, one text and one token at a time."""
    total = 0.0
    for position in range(start, len(text)):
        logits = decoder(torch.tensor([text[:position]])).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), 0)[text[position]])
    return total


def test_the_likelihood_is_that_of_the_document_tokens_whatever_they_are_batched_with(decoder):
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 40, length).tolist() for length in (5, 30, 12, 12, 7)]
    starts = [2, 4, 1, 11, 3]
    expected = [plain(decoder, text, start) for text, start in zip(texts, starts)]
    for budget in (8192, 20):
        found = log_likelihood(decoder, TokenStore.build(texts, starts), 0, forward_tokens=budget)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_evidence_is_what_the_query_adds_to_the_likelihood(decoder, tmp_path):
    """Rows of two queries in turn, so that grouping has to move them; the decoder's own, saved and read back."""
    documents = ["red boots for rain", "a blue kettle", "boots", "tea"]
    rows = pa.table({
        "query_id": ["a", "b", "a", "b"], "doc_id": ["1", "2", "3", "4"], "query": ["boots", "kettle"] * 2,
        "title": documents, "summary": ["a summary"] * 4,
    })  # fmt: skip
    tokenizer = train_bpe([(["boots", "kettle"], documents[:2], documents[2:])], 400)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.5, **shape)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    text_format = save_tokenizer(tokenizer, tmp_path, FieldLimits(8, 16, 16), 64)
    groups = evidence_groups(str(tmp_path), text_format, tokenizer.pad_token_id, rows, bf16=False, forward_tokens=64)

    def likelihood(queries: list[str]) -> np.ndarray:
        pairs = text_format.encode(queries, documents, ["a summary"] * 4)
        return np.array([plain(model, pair.ids, pair.document_start) for pair in pairs])

    expected = likelihood(["boots", "kettle"] * 2) - likelihood([""] * 4)
    assert groups.query_ids == ["a", "b"] and expected.std() > 0.1
    np.testing.assert_allclose(groups.targets, (expected / expected.std())[[0, 2, 1, 3]], atol=1e-4)
    for weights in model.parameters():
        torch.nn.init.zeros_(weights)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="tell no document from another"):
        evidence_groups(str(tmp_path), text_format, tokenizer.pad_token_id, rows, bf16=False, forward_tokens=64)


def candidates(folder: Path, queries: int, order: np.random.Generator | None = None) -> Path:
    ids = [(f"q{query}", f"d{document}") for query in range(queries) for document in range(1 + query % 7)]
    if order is not None:
        ids = [ids[i] for i in order.permutation(len(ids))]
    query_ids, doc_ids = map(list, zip(*ids))
    fields = {name: ["text"] * len(ids) for name in ("query", "title", "summary")}
    path = folder / "candidates.parquet"
    write_table(path, "candidates", pa.table({"query_id": query_ids, "doc_id": doc_ids, **fields}))
    return path


def test_whole_random_queries_are_drawn_in_pieces_the_same_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr("training.teacher.likelihood.iter_table", partial(iter_table, batch_rows=11))
    for name in "ab":
        (tmp_path / name).mkdir()
    drawn = sample_groups(candidates(tmp_path / "a", 50), 10, 3, seed=1)
    counts = drawn.group_by("query_id").aggregate([("doc_id", "count")]).to_pylist()
    assert len(counts) == 10
    assert all(1 < row["doc_id_count"] == min(3, 1 + int(row["query_id"][1:]) % 7) for row in counts)
    shuffled = candidates(tmp_path / "b", 50, np.random.default_rng(0))
    assert sample_groups(shuffled, 10, 3, seed=1).equals(drawn)
    other = sample_groups(shuffled, 10, 3, seed=2)
    assert set(other.column("query_id").to_pylist()) != set(drawn.column("query_id").to_pylist())
    assert len(sample_groups(shuffled, 0, 0, seed=1)) == sum(query % 7 + 1 for query in range(50) if query % 7)
    for rows, reason in ((drawn.slice(0, 0), "no candidate"), (drawn.slice(0, 1), "no query with two candidates")):
        write_table(shuffled, "candidates", rows)
        with pytest.raises(InputError, match=reason):
            sample_groups(shuffled, 10, 3, seed=1)


def test_a_pair_that_stands_twice_is_named_wherever_it_stands(tmp_path, monkeypatch):
    path = candidates(tmp_path, 20)
    rows = read_table(path, "candidates")
    monkeypatch.setattr("training.teacher.likelihood.iter_table", partial(iter_table, batch_rows=11))
    pq.write_table(pa.concat_tables([rows, rows.slice(4, 1)]), path)
    with pytest.raises(DataError, match="query 'q2' has document 'd1' twice"):
        sample_groups(path, 0, 0, seed=1)


def test_each_query_is_as_likely_to_be_drawn(tmp_path):
    path = candidates(tmp_path, 20)
    several = [query for query in range(20) if query % 7]
    times = np.zeros(20)
    for seed in range(400):
        for query_id in set(sample_groups(path, 5, 1, seed).column("query_id").to_pylist()):
            times[int(query_id[1:])] += 1
    assert times.sum() == times[several].sum() == 5 * 400
    # binomial with mean 118 and deviation 9.1; five deviations for the furthest of seventeen
    assert np.abs(times[several] - 400 * 5 / 17).max() < 46
