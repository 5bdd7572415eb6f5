"""The late-interaction start of a student from scratch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ranking.limits import FieldLimits
from training.student.encoder import StudentModelSettings, create_student
from training.student.student_groups import judged_groups
from training.student.word_embedding_start import fit_word_embeddings, late_interaction
from training.world.dataset import WorldConfig, write_world


def test_late_interaction_prefers_the_document_that_holds_the_query_word_whatever_its_length():
    words = nn.Embedding.from_pretrained(torch.eye(6) * 4)
    ids = torch.tensor([[1, 2, 3, 0, 0], [1, 4, 3, 5, 2], [1, 1, 3, 0, 0], [1, 1, 3, 5, 4]])
    is_query = torch.tensor([[True, False, False, False, False]] * 4)
    is_document = (ids > 0) & ~is_query
    without, without_long, with_word, with_word_long = late_interaction(words, ids, is_query, is_document).tolist()
    assert without == pytest.approx(without_long)  # no match: length alone gives nothing
    assert with_word > with_word_long > without + 5


def test_the_fit_orders_the_training_groups_and_the_encoder_starts_from_its_words(tmp_path):
    write_world(
        WorldConfig.small(train_queries=24, dev_queries=12, test_queries=4, unlabelled_queries=4), tmp_path / "data"
    )
    settings = StudentModelSettings(size="tiny-2", vocabulary_size=800, limits=FieldLimits(8, 8, 12))
    student = create_student(settings, tmp_path / "data", tmp_path / "work", seed=1)
    groups = judged_groups(tmp_path / "data" / "judgments" / "train.parquet", student.text_format)
    loss = fit_word_embeddings(student, groups, steps=40, seed=1)
    assert loss < 0.45  # an order drawn at random costs log 2 = 0.69
    embeddings = student.model.bert.embeddings.word_embeddings.weight
    assert embeddings.std().item() == pytest.approx(0.5, rel=1e-3)
    segment, other = student.model.bert.embeddings.token_type_embeddings.weight
    assert torch.equal(segment, -other)
    for layer in student.model.bert.encoder.layer:
        attention = layer.attention.self
        assert torch.equal(attention.query.weight, attention.key.weight)
        a_word = embeddings[7] - segment * (embeddings[7] @ segment) / (segment @ segment)
        assert torch.cosine_similarity(attention.query(a_word), a_word, dim=0) > 0.9
        assert attention.query(segment).norm() < 0.3 * segment.norm()
