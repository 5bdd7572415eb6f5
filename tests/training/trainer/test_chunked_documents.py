"""Training on documents in chunks: batches hold whole documents, and the loss is that of the pooled scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from training.student.student_groups import joined, select_queries
from training.trainer import losses
from training.trainer.group_batches import GroupBatches, RankingGroups
from training.trainer.ranking_trainer import RankingTrainer, only_best_chunks, pool_chunks
from training.trainer.token_store import TokenStore
from training.trainer.training_settings import TrainingSettings

CHUNKS = np.array([1, 3, 2, 1, 5, 1, 2, 2, 4, 1, 1, 3])  # of each document; queries have 4 of them


def groups(pooling: str = "max", seed: int = 0) -> RankingGroups:
    """Rows of three queries in mixed order; each document's chunks differ in length and content."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(CHUNKS)])
    texts = [rng.integers(5, 50, rng.integers(3, 12)) for _ in range(starts[-1])]
    store = TokenStore.build(texts, np.full(len(texts), 2))
    return RankingGroups.of_rows(list("abcabcabcabc"), np.arange(12.0) % 5, store, starts, pooling)


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    made = BertForSequenceClassification(config)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(4.0)
    return made


def document_scores(ranker, found: RankingGroups) -> torch.Tensor:
    """Each chunk scored alone, without padding or batches; the documents' scores by the plain definition."""
    scores = []
    for start, end in zip(found.chunk_starts, found.chunk_starts[1:]):
        rows = [found.store.pad([row], 0, token_types=True) for row in range(start, end)]
        chunks = torch.cat([ranker(**row).logits[:, 0] for row in rows])
        scores.append(chunks.max() if found.pooling == "max" else chunks.mean())
    return torch.stack(scores)


@pytest.mark.parametrize("process_count", [1, 2])
def test_a_batch_holds_every_chunk_of_its_documents_once_on_one_process(process_count):
    found = groups()
    shares = [
        GroupBatches(
            found, batch_groups=3, forward_tokens=30, pad_id=0, seed=0, process_index=i, process_count=process_count
        )[0]
        for i in range(process_count)
    ]
    assert sum(len(share["targets"]) for share in shares) == 12 == shares[0]["normaliser"]
    seen = [np.bincount(share["documents"].numpy(), minlength=len(share["targets"])) for share in shares]
    assert sorted(np.concatenate(seen)) == sorted(CHUNKS)
    for share in shares:
        assert sum(share["rows"]) == len(share["documents"])


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_the_loss_and_its_gradient_are_those_of_the_pooled_scores(tmp_path, pooling):
    found = groups(pooling)
    expected, trained = model(), model()
    loss = losses.ranknet(
        document_scores(expected, found), torch.from_numpy(found.targets), torch.from_numpy(found.group_of_document())
    )
    loss.backward()
    settings = TrainingSettings(epochs=1, batch_groups=3, forward_tokens=30, precision="fp32")
    trainer = RankingTrainer(
        trained, settings, found, None, loss=losses.ranknet, pad_id=0, token_types=True, out=tmp_path
    )
    batch = trainer.train_dataset[0]
    actual = trainer.compute_loss(trained, batch)
    actual.backward()
    assert actual.item() == pytest.approx(loss.item(), abs=1e-5)
    for one, other in zip(expected.parameters(), trained.parameters()):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, atol=2e-5, rtol=1e-3)
    np.testing.assert_allclose(trainer.score(found), document_scores(expected, found).detach(), atol=1e-5)


def test_under_autocast_the_choice_of_chunks_costs_no_gradient():
    """PyTorch keeps weights that were cast while no gradient was wanted, and would go on with them."""
    found, ranker = groups(), model()
    batch = GroupBatches(found, batch_groups=3, forward_tokens=30, pad_id=0, seed=0, token_types=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        chosen = only_best_chunks(ranker, batch)
        scores = torch.cat(
            [ranker(**forward).logits[:, 0][:n] for forward, n in zip(chosen["forwards"], chosen["rows"])]
        )
    pool_chunks(scores.float(), chosen["documents"], 12, "max").sum().backward()
    assert len(scores) == 12 and sorted(chosen["documents"].tolist()) == list(range(12))
    weights = ranker.bert.encoder.layer[0].attention.self.value.weight
    assert weights.grad is not None and weights.grad.abs().sum() > 0


def test_chosen_and_joined_queries_keep_their_documents_chunks():
    found = groups()
    second = select_queries(found, [1])
    assert np.diff(second.chunk_starts).tolist() == CHUNKS[[1, 4, 7, 10]].tolist()
    assert (second.store[1] == found.store[int(found.chunk_starts[4]) + 1]).all()
    both = joined(found, second)
    assert len(both) == 4 and np.diff(both.chunk_starts)[12:].tolist() == CHUNKS[[1, 4, 7, 10]].tolist()
    assert (both.store[len(found.store)] == second.store[0]).all()
    scores = np.arange(len(both.store), dtype=np.float32)
    assert both.pool(scores).tolist() == (both.chunk_starts[1:] - 1).tolist()
