"""Scoring on tiny random checkpoints: pooling, batching, cards, and what must not pass for a ranker."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

from ranking.card import ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.text import STUDENT_FORMAT, TEACHER_FORMAT, StudentFormat, TeacherFormat
from tests.helpers.foreign_encoders import make_encoder
from training.evaluation.checkpoint_scores import Scorer, score_pairs
from training.trainer.training_settings import bf16_is_native

SENTENCES = ["red running shoes for men", "a cheap flight to rome", "how to bake sourdough bread at home", "rome guide"]
QUERIES = ["running shoes", "rome flight", "bread", "rome"] * 5
TITLES = ["Red shoes", "Fly cheap to Rome", "", "Bake bread </s> [SEP] at home"] * 5
SUMMARIES = [" ".join(SENTENCES[: i % 4 + 1]) for i in range(20)]


def card(role: str, folder: Path, **changes) -> ScoreCard:
    teacher = role in ("teacher", "pretrained")
    values = {
        "role": role,
        "text_format": TEACHER_FORMAT if teacher else STUDENT_FORMAT,
        "format_version": 1,
        "limits": FieldLimits(8, 8, 24),
        "head": "linear",
        "pooling": "last_token" if teacher else "cls",
        "vocabulary": fingerprint(folder / "tokenizer.json"),
    }
    found = ScoreCard(**(values | changes))
    found.save(folder)
    return found


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    set_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    card("student", folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    # pad = eos on purpose: the model's own search for the last token goes wrong here
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=256, num_labels=1, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    card("teacher", folder)
    return folder


def test_a_teachers_score_is_the_head_on_the_final_token_of_each_text_alone(teacher):
    text_format = TeacherFormat.of_checkpoint(teacher)
    model = LlamaForSequenceClassification.from_pretrained(teacher).eval()
    expected = []
    for text in text_format.texts(QUERIES, TITLES, SUMMARIES):
        ids = text_format.tokenizer.encode(text.text).ids
        assert ids[-1] == text_format.eos_id
        with torch.no_grad():
            expected.append(model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item())
    found = score_pairs(teacher, QUERIES, TITLES, SUMMARIES, batch_tokens=300)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.std(found) > 1e-3


def test_a_students_score_is_the_models_logit_with_token_types(student):
    model = BertForSequenceClassification.from_pretrained(student).eval()
    expected = []
    for pair in StudentFormat.of_checkpoint(student).encode(QUERIES, TITLES, SUMMARIES):
        types = [int(place >= pair.document_start) for place in range(len(pair.ids))]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([pair.ids]), token_type_ids=torch.tensor([types]))
        expected.append(output.logits.item())
    np.testing.assert_allclose(score_pairs(student, QUERIES, TITLES, SUMMARIES), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_batching_and_row_order_do_not_change_scores(kind, request):
    scorer = Scorer.load(request.getfixturevalue(kind))
    together = scorer.score(QUERIES, TITLES, SUMMARIES)
    one_by_one = scorer.score(QUERIES, TITLES, SUMMARIES, batch_tokens=1)
    backwards = scorer.score(QUERIES[::-1], TITLES[::-1], SUMMARIES[::-1])[::-1]
    np.testing.assert_allclose(one_by_one, together, atol=1e-5)
    np.testing.assert_allclose(backwards, together, atol=1e-5)
    bfloat16 = scorer.score(QUERIES, TITLES, SUMMARIES, precision="bfloat16")
    assert 0 < np.abs(bfloat16 - together).max() < 0.2 * np.abs(together).max()
    auto = scorer.score(QUERIES, TITLES, SUMMARIES, precision="auto")
    np.testing.assert_array_equal(auto, bfloat16 if bf16_is_native() else together)
    assert scorer.score([], [], []).shape == (0,)


def test_a_mean_pooled_teacher_takes_the_mean_over_real_tokens(teacher, tmp_path):
    folder = copy(teacher, tmp_path / "mean")
    card("teacher", folder, pooling="mean")
    text_format = TeacherFormat.of_checkpoint(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    ids = text_format.tokenizer.encode(text_format.texts(QUERIES[:1], TITLES[:1], SUMMARIES[:1])[0].text).ids
    with torch.no_grad():
        expected = model.score(model.model(torch.tensor([ids])).last_hidden_state.mean(1)).item()
    found = score_pairs(folder, QUERIES, TITLES, SUMMARIES)
    assert found[0] == pytest.approx(expected, abs=1e-5)


def test_a_lora_teacher_scores_as_its_merged_model(teacher, tmp_path):
    from peft import LoraConfig, get_peft_model

    set_seed(1)
    base = LlamaForSequenceClassification.from_pretrained(teacher)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, lora)
    torch.nn.init.normal_(base.score.modules_to_save["default"].weight)
    folder = copy(teacher, tmp_path / "lora")
    (folder / "model.safetensors").unlink()
    adapted.save_pretrained(folder)
    merged = copy(teacher, tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(merged)
    found = score_pairs(folder, QUERIES, TITLES, SUMMARIES)
    np.testing.assert_allclose(found, score_pairs(merged, QUERIES, TITLES, SUMMARIES), atol=1e-5)
    assert np.abs(found - score_pairs(teacher, QUERIES, TITLES, SUMMARIES)).max() > 1e-2


def test_a_cross_encoder_without_a_card_is_scored_by_its_own_pair_template(student, tmp_path):
    folder = copy(student, tmp_path / "plain")
    (folder / "ranker.json").unlink()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    encoded = tokenizer(["running shoes"], ["Red shoes red running"], return_tensors="pt")
    assert encoded["token_type_ids"].sum() > 0
    with torch.no_grad():
        expected = model(**encoded).logits.item()
    found = score_pairs(folder, ["running  shoes", "bread"], ["Red shoes", ""], ["red running", "x " * 5000])
    assert found[0] == pytest.approx(expected, abs=1e-5)


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("family, positions", [("bert", 64), ("xlm-roberta", 66)])
def test_a_cross_encoder_of_few_positions_reads_as_much_as_it_can(family, positions, tmp_path):
    """Seen: a tokenizer that names no length let 512 tokens into a model of 64 positions: a stack trace."""
    folder = make_encoder(tmp_path, family, max_position_embeddings=positions)
    long, cut = score_pairs(folder, ["rome"] * 2, ["guide"] * 2, ["a cheap flight to rome " * n for n in (200, 40)])
    assert long == pytest.approx(cut, abs=1e-5)


def test_a_model_without_a_trained_head_is_refused(student, teacher, tmp_path):
    headless = copy(student, tmp_path / "headless")
    BertModel.from_pretrained(student).save_pretrained(headless)
    with pytest.raises(InputError, match=r"lack .*classifier"):
        score_pairs(headless, ["a"], ["b"], ["c"])
    language_model = copy(teacher, tmp_path / "lm")
    config = LlamaConfig.from_pretrained(teacher)
    LlamaForCausalLM(config).save_pretrained(language_model)
    with pytest.raises(InputError, match=r"lack score\.weight"):
        score_pairs(language_model, ["a"], ["b"], ["c"])


def test_a_card_that_does_not_fit_the_folder_is_refused(student, teacher, tmp_path):
    folder = copy(student, tmp_path / "swapped")
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(InputError, match="not the tokenizer that the score card names"):
        Scorer.load(folder)
    stage_one = copy(teacher, tmp_path / "stage1")
    card("pretrained", stage_one, head="none")
    with pytest.raises(InputError, match="is a pretrained, a teacher or student or baseline is needed"):
        Scorer.load(stage_one)


def test_scores_that_are_not_finite_are_an_error(student, tmp_path):
    folder = copy(student, tmp_path / "diverged")
    model = BertForSequenceClassification.from_pretrained(student)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="20 of 20 scores are not finite"):
        score_pairs(folder, QUERIES, TITLES, SUMMARIES)
