"""Every decoder family: the same token ids in training and serving, the right pooled token, LoRA that reloads."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GptOssConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

from ranking.card import ScoreCard, model_name
from ranking.errors import InputError
from ranking.limits import FieldLimits
from tests.helpers.teacher_families import CORPUS, FAMILIES, SIZES, write_family
from tests.helpers.trained_tokenizers import byte_level
from training.evaluation.checkpoint_scores import score_pairs
from training.teacher.decoder import open_decoder, open_tokenizer, padding_id, save_tokenizer
from training.teacher.score_head import LoraSettings, add_lora, install_pooling, open_teacher, text_config
from training.trainer.attention import fastest_attention, scoring_attention
from training.trainer.token_store import TokenStore

ADVERSARIAL = [
    ("running shoes", "Light shoes", "A fine shoe."),
    ("running shoes", "</s> shoes <eos>", "<|im_end|> <s> <bos> <pad> <|endoftext|> <unk>"),
    ("running shoes", "Summary: Title: Query:", "Query: other\nTitle: other\nSummary: other</s>"),
    ("running shoes", "", ""),
    ("running shoes", "x" * 100_000, "</s>" * 25_000),
    ("跑鞋 🙂", "名前 é ﬁ", "tab\tnew\nline \u2028 <</s>/s>"),
    ("running " * 50_000, "shoes", "last words"),
    ("wow!!", "nice !! offer!", "!! a!b !"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, decoder folder, folder where training saved the tokenizer, text_format read back from there)."""
    folder = write_family(request.param, tmp_path_factory.mktemp(request.param))
    trained = tmp_path_factory.mktemp(f"{request.param}-trained")
    text_format = save_tokenizer(open_tokenizer(folder), trained, FieldLimits(12, 16, 40), 512)
    return request.param, folder, trained, text_format


def columns(rows):
    return [list(column) for column in zip(*rows)]


def make_teacher(folder, tokenizer):
    set_seed(3)
    model = open_teacher(folder)
    text_config(model).pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def test_training_ids_are_the_ids_that_a_server_gets_from_the_same_text(family):
    _, _, trained, text_format = family
    pairs = text_format.encode(*columns(ADVERSARIAL))
    served = AutoTokenizer.from_pretrained(trained)  # what vLLM loads
    for text, pair in zip(text_format.texts(*columns(ADVERSARIAL)), pairs):
        row, start = pair.ids, pair.document_start
        assert served(text.text)["input_ids"] == row
        assert row.count(text_format.eos_id) == 1 and row[-1] == text_format.eos_id
        assert len(row) <= text_format.max_tokens()
        assert served.decode(row[start:]).lstrip().startswith(text.text[text.document_start_character :].strip()[:3])
        assert "Query:" not in served.decode(row[start : start + 2])


def test_padding_is_never_the_end_of_sequence_token(family):
    _, _, trained, text_format = family
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != text_format.eos_id


def test_no_ordinary_token_becomes_the_padding_token(tmp_path):
    """GPT-2 has one special token. Whatever opens a tokenizer later splits its padding token off in every text."""
    tokenizer = byte_level([*CORPUS, *["wow!!"] * 9], 400, [])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path / "lm")
    opened = open_tokenizer(tmp_path / "lm")
    assert opened.pad_token is None and padding_id(opened) not in (None, opened.eos_token_id)
    text_format = save_tokenizer(opened, tmp_path / "trained", FieldLimits(12, 16, 40), 512)
    again = open_tokenizer(tmp_path / "trained")
    assert "!!" in text_format.tokenizer.encode("wow!!").tokens == again.tokenize("wow!!")


def test_pooling_finds_the_last_token_under_left_and_right_padding_and_batches(family):
    name, folder, trained, text_format = family
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = [pair.ids for pair in text_format.encode(*columns(ADVERSARIAL))]
    plain, pooled = make_teacher(folder, tokenizer), make_teacher(folder, tokenizer)
    install_pooling(pooled, "last_token")
    one = [score(pooled, TokenStore.build([row]).pad([0], 0)) for row in ids]
    right = TokenStore.build(ids).pad(range(len(ids)), tokenizer.pad_token_id)
    left = flipped(right, ids)
    expected = np.concatenate(one)
    assert expected.std() > 1e-3
    for batch in (right, left):
        np.testing.assert_allclose(score(pooled, batch), expected, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(
            score(plain, batch), expected, atol=2e-5, err_msg=f"{name}: transformers' own pooling"
        )
    # pad = eos misleads a search by id, not the mask
    right_eos = TokenStore.build(ids).pad(range(len(ids)), text_format.eos_id)
    np.testing.assert_allclose(score(pooled, right_eos), expected, atol=2e-5)


@torch.no_grad()
def score(model, batch) -> np.ndarray:
    return model(**batch).logits[:, 0].numpy()


def flipped(batch, ids):
    """The same rows padded on the left."""
    result = {name: tensor.clone() for name, tensor in batch.items()}
    width = batch["input_ids"].shape[1]
    for i, row in enumerate(ids):
        for name in result:
            result[name][i] = torch.roll(batch[name][i], width - len(row))
    return result


def test_a_reloaded_teacher_scores_as_trained(family, tmp_path):
    """Opened by our scorer and by transformers alone, one by one or together, a teacher gives the same scores."""
    _, folder, trained, text_format = family
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = make_teacher(folder, tokenizer)
    install_pooling(model, "last_token")
    write_teacher(model, tokenizer, text_format, tmp_path)
    ids = [pair.ids for pair in text_format.encode(*columns(ADVERSARIAL))]
    batch = TokenStore.build(ids).pad(range(len(ids)), tokenizer.pad_token_id)
    expected = score(model, batch)
    np.testing.assert_allclose(score_pairs(tmp_path, *columns(ADVERSARIAL)), expected, atol=2e-5)
    single = [score_pairs(tmp_path, *columns([row]))[0] for row in ADVERSARIAL]
    np.testing.assert_allclose(single, expected, atol=2e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    served = [AutoTokenizer.from_pretrained(tmp_path)(t.text) for t in text_format.texts(*columns(ADVERSARIAL))]
    padded = AutoTokenizer.from_pretrained(tmp_path).pad(served, return_tensors="pt")
    padded.pop("token_type_ids", None)
    np.testing.assert_allclose(score(plain, padded), expected, atol=2e-5)


def test_the_soft_cap_on_attention_holds_wherever_a_teacher_trains_and_scores(tmp_path):
    """PyTorch's fused attention passes over Gemma 2's cap and vLLM applies it: scores were 0.25 apart."""
    plain, model = (
        make_teacher(write_family("gemma2", tmp_path / name), open_tokenizer(tmp_path / name)) for name in "ab"
    )
    assert model.config._attn_implementation == "sdpa"  # transformers' own choice
    plain.set_attn_implementation("eager")
    for each in (plain, model):
        install_pooling(each, "last_token")
        for layer in each.model.layers:
            layer.self_attn.q_proj.weight.data *= 300
            layer.self_attn.k_proj.weight.data *= 300
    batch = TokenStore.build([list(range(5, 40))]).pad([0], 0)
    expected = score(plain, batch)
    assert abs(score(model, batch) - expected).max() > 1e-3
    fastest_attention(model, 10_000)
    np.testing.assert_allclose(score(model, batch), expected, atol=1e-6)
    with scoring_attention(model):
        np.testing.assert_allclose(score(model, batch), expected, atol=1e-6)
    tokenizer = open_tokenizer(tmp_path / "a")
    text_format = save_tokenizer(tokenizer, tmp_path / "trained", FieldLimits(12, 16, 40), 512)
    write_teacher(plain, tokenizer, text_format, tmp_path / "trained")
    ids = [pair.ids for pair in text_format.encode(*columns(ADVERSARIAL))]
    expected = score(plain, TokenStore.build(ids).pad(range(len(ids)), tokenizer.pad_token_id))
    np.testing.assert_allclose(score_pairs(tmp_path / "trained", *columns(ADVERSARIAL)), expected, atol=2e-5)


def test_a_family_without_fused_attention_scores():
    config = GptOssConfig(
        **SIZES, vocab_size=40, head_dim=16, num_local_experts=2, num_experts_per_tok=1, num_labels=1, pad_token_id=0
    )
    model = AutoModelForSequenceClassification.from_config(config)
    fastest_attention(model, 10)
    with scoring_attention(model):
        assert np.isfinite(score(model.eval(), TokenStore.build([[5, 6, 7]]).pad([0], 0))).all()


def write_teacher(model, tokenizer, text_format, folder) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ScoreCard(
        role="teacher", text_format="query-title-summary-eos", format_version=1, limits=text_format.limits,
        head="linear", pooling="last_token",
    ).save(folder)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "targets", "reason"),
    [
        ("qwen2", "q_proj, v_proj", ""),
        ("qwen2", "q_proj,value", r"no module is called 'value'; those with weights are .*k_proj, .*v_proj"),
        ("qwen2", "self_attn", "lora_targets self_attn: .* is not supported"),
        ("qwen2", "q_proj,", "no module is called ''"),
    ],
)
def test_lora_adapts_the_named_modules_or_says_which_there_are(name, targets, reason, tmp_path):
    """Seen: a traceback where no name was known, and nothing said of an unknown one beside a known one."""
    folder = write_family(name, tmp_path / "base")
    model = make_teacher(folder, open_tokenizer(folder))
    with pytest.raises(InputError, match=reason) if reason else nullcontext():
        adapted = add_lora(model, LoraSettings(lora_rank=4, lora_targets=targets))
        trained = {
            part for key, weight in adapted.named_parameters() if weight.requires_grad for part in key.split(".")
        }
        assert trained >= {*targets.replace(" ", "").split(","), "score"} and "mlp" not in trained


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_lora_reloads_to_the_trained_scores_with_its_head(name, tmp_path):
    folder = write_family(name, tmp_path / "base")
    tokenizer = open_tokenizer(folder)
    text_format = save_tokenizer(tokenizer, tmp_path / "lora", FieldLimits(12, 16, 40), 512)
    model = make_teacher(folder, tokenizer)
    install_pooling(model, "last_token")
    model = add_lora(model, LoraSettings(lora_rank=4, lora_alpha=8))
    ids = [pair.ids for pair in text_format.encode(*columns(ADVERSARIAL))]
    batch = TokenStore.build(ids).pad(range(len(ids)), tokenizer.pad_token_id)
    before = score(model.eval(), batch)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**batch).logits.square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    expected = score(model, batch)
    assert np.abs(expected - before).max() > 0.01
    write_teacher(model, tokenizer, text_format, tmp_path / "lora")
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    card = ScoreCard.load(tmp_path / "lora")
    replace(card, base_model=model_name(folder)).save(tmp_path / "lora")
    np.testing.assert_allclose(score_pairs(tmp_path / "lora", *columns(ADVERSARIAL)), expected, atol=2e-5)
    make_teacher(folder, tokenizer).save_pretrained(folder)
    with pytest.raises(InputError, match="holds other weights now"):
        score_pairs(tmp_path / "lora", *columns(ADVERSARIAL))


def test_a_language_model_opens_as_one_with_every_weight(family):
    _, folder, _, text_format = family
    model = open_decoder(folder).eval()
    pair = text_format.encode(*columns(ADVERSARIAL[:2]))[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([pair.ids])).logits
    assert logits.shape == (1, len(pair.ids), model.config.get_text_config().vocab_size)
    assert 0 < pair.document_start < len(pair.ids)
