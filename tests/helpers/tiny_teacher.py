"""Tiny random teacher checkpoints of each tested family, with a byte-level BPE tokenizer trained on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from ranking.card import ScoreCard, fingerprint
from ranking.limits import FieldLimits
from ranking.text import FORMAT_VERSION, TEACHER_FORMAT

SENTENCES = [
    "Query: running shoes\nTitle: light running shoes for men\nSummary: cushioned, breathable, size 36 to 48",
    "Query: flights to rome\nTitle: cheap flights to Rome\nSummary: compare 200 airlines and book without fees",
    "Query: laufschuhe größe 44\nTitle: Laufschuhe für Damen und Herren\nSummary: schnelle Lieferung, 30 Tage Rückgabe",
]
LIMITS = FieldLimits(max_query_tokens=16, max_title_tokens=24, max_summary_tokens=48)
FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gpt_neox", "phi")


def make_tokenizer(vocabulary: int = 400, begin: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <pad>, <s>, </s> and one unused token; begin: whether texts start with <s>, as Llama's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>", "<unused0>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def family_config(family: str, vocabulary: int, hidden: int = 64, layers: int = 2) -> PretrainedConfig:
    shared = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,  # vLLM's CPU attention takes heads of 32 and wider
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "num_labels": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "gemma2":
        return Gemma2Config(**shared, head_dim=32, query_pre_attn_scalar=32, sliding_window=32)
    if family == "gpt_neox":  # its body and its head have other names than those of all the others
        shared.pop("num_key_value_heads")
    classes = {
        "llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig, "gpt_neox": GPTNeoXConfig,
        "phi": PhiConfig,
    }  # fmt: skip
    return classes[family](**shared)


def make_teacher(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a teacher checkpoint with random weights whose scores spread over several units."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(begin=family != "qwen2")
    model = AutoModelForSequenceClassification.from_config(family_config(family, len(tokenizer)))
    with torch.no_grad():
        model.score.weight.normal_(0, 0.5)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ScoreCard(
        role="teacher",
        text_format=TEACHER_FORMAT,
        format_version=FORMAT_VERSION,
        limits=LIMITS,
        head="linear",
        pooling="last_token",
        vocabulary=fingerprint(folder / "tokenizer.json"),
        base_model=f"random {family}",
    ).save(folder)
    return folder
