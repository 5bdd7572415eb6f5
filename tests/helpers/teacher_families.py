"""Tiny random checkpoints of the decoder families that teachers are made of, each with a tokenizer of its own kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from tests.helpers.trained_tokenizers import byte_level

CORPUS = [
    f"Query: {query}\nTitle: {title}\nSummary: {summary}"
    for query, title, summary in [
        ("running shoes", "Light shoes for runners", "A light running shoe with a firm sole, in red and blue."),
        ("paella recipe", "Seafood paella", "Rice with saffron, prawns and mussels from Valencia, ready in one hour."),
        ("北京 hotel", "Café hotel 北京", "Rooms near the old town; breakfast is included, dogs are welcome 🙂."),
        ("wireless headset", "Headset with noise cancelling", "Thirty hours of music on a single charge."),
    ]
]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 48, "max_position_embeddings": 512,
}  # fmt: skip


def sentencepiece_like(pad: str, bos: str, eos: str, adds_bos: bool) -> Tokenizer:
    """As Llama, Mistral and Gemma have it: spaces become ▁, unknown characters fall back to bytes, bos is added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = list(dict.fromkeys([pad, "<unk>", bos, eos]))
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials + bytes_, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # byte tokens are ordinary vocabulary: keep them out of the added tokens, as the real files do
    rebuilt = Tokenizer.from_str(_without_added(tokenizer.to_str(), bytes_))
    if adds_bos:
        rebuilt.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, rebuilt.token_to_id(bos))])
    return rebuilt


def _without_added(serialised: str, contents: list[str]) -> str:
    import json

    state = json.loads(serialised)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in contents]
    return json.dumps(state)


def _wrap(tokenizer: Tokenizer, **tokens: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def _llama_like(pad: str | None) -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece_like(pad or "<unk>", "<s>", "</s>", adds_bos=True)
    return _wrap(tokenizer, pad_token=pad, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _qwen() -> PreTrainedTokenizerFast:
    tokenizer = byte_level(CORPUS, 600, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrap(tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def _qwen_base() -> PreTrainedTokenizerFast:
    """Qwen's base models: the padding token is the end-of-sequence token, ordinary tokens have the lowest ids."""
    tokenizer = byte_level([*CORPUS, *["wow!! nice !!"] * 9], 600, [])
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrap(tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>")


def _gemma() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece_like("<pad>", "<bos>", "<eos>", adds_bos=True)
    return _wrap(tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


FAMILIES: dict[str, tuple[type, Any, dict]] = {
    "llama": (LlamaConfig, lambda: _llama_like(None), {"tie_word_embeddings": False}),
    "mistral": (MistralConfig, lambda: _llama_like("<pad>"), {"sliding_window": 64}),
    "qwen2": (Qwen2Config, _qwen_base, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, _qwen, {"head_dim": 16}),
    "gemma": (GemmaConfig, _gemma, {"head_dim": 16}),
    "gemma2": (Gemma2Config, _gemma, {"head_dim": 16, "sliding_window": 64}),
    "gemma3": (Gemma3TextConfig, _gemma, {"head_dim": 16, "sliding_window": 64}),
}


def write_family(family: str, folder: Path) -> Path:
    """A tiny random causal language model of the family with its tokenizer, as a Hugging Face folder."""
    config_class, make_tokenizer, extra = FAMILIES[family]
    tokenizer = make_tokenizer()
    torch.manual_seed(7)
    config = config_class(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **(SIZES | extra),
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
