"""Tiny random encoder rerankers, each with a tokenizer of its family's kind, and transformers' own score of a pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
)

from tests.helpers.foreign_rerankers import CORPUS
from tests.helpers.trained_tokenizers import word_piece

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 514, "num_labels": 1,
}  # fmt: skip


def _wrap(
    tokenizer: Tokenizer, first: str, separator: str, pad: str, unknown: str, pair: str
) -> PreTrainedTokenizerFast:
    """The tokenizer with its marks around a text and around a pair, and token types if the pair's form has any."""
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in dict.fromkeys((first, separator))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{first} $A {separator}", pair, marks)
    types = ["token_type_ids"] if ":1" in pair else []
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=first, sep_token=separator,
        model_input_names=["input_ids", *types, "attention_mask"],
    )  # fmt: skip


def bert_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = word_piece(CORPUS, 400)
    return _wrap(tokenizer, "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[CLS] $A [SEP] $B:1 [SEP]:1")


def xlm_roberta_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=marks, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "größe 44"], trainer)
    return _wrap(tokenizer, "<s>", "</s>", "<pad>", "<unk>", "<s> $A </s> </s> $B </s>")


def modernbert_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer, "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[CLS] $A [SEP] $B [SEP]")


def deberta_tokenizer() -> PreTrainedTokenizerFast:
    """As DeBERTa-v3's: pieces of a Unigram model, BERT's marks, and token types that the model does not read."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    marks = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=marks, unk_token="[UNK]", show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "größe 44"], trainer)
    return _wrap(tokenizer, "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[CLS] $A [SEP] $B:1 [SEP]:1")


DEBERTA = {
    "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False, "pooler_hidden_size": 32,
}  # fmt: skip

ENCODERS: dict[str, tuple[type, Callable[[], PreTrainedTokenizerFast], dict]] = {
    "bert": (BertConfig, bert_tokenizer, {}),
    "xlm-roberta": (XLMRobertaConfig, xlm_roberta_tokenizer, {"type_vocab_size": 1}),
    "modernbert": (ModernBertConfig, modernbert_tokenizer, {"local_attention": 16}),
    "deberta-v2": (DebertaV2Config, deberta_tokenizer, DEBERTA),
}


def make_encoder(folder: Path, family: str, **changes) -> Path:
    """A tiny random encoder reranker as a Hugging Face folder, its scores spread over some tenths."""
    config_class, make_tokenizer, extra = ENCODERS[family]
    tokenizer = make_tokenizer()
    torch.manual_seed(5)
    marks = {"pad_token_id": tokenizer.pad_token_id, "cls_token_id": tokenizer.cls_token_id,
             "sep_token_id": tokenizer.sep_token_id, "bos_token_id": tokenizer.cls_token_id,
             "eos_token_id": tokenizer.sep_token_id}  # fmt: skip
    config = config_class(vocab_size=len(tokenizer), **(SIZES | marks | extra | changes))
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.5 if "classifier" in name else 0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.inference_mode()
def transformers_scores(folder: Path, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """The logit of each (query, document) as transformers makes it, one pair at a time, in float32."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return [
        float(model(**tokenizer([query], [document], return_tensors="pt")).logits[0, 0]) for query, document in pairs
    ]
