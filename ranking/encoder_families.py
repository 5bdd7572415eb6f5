"""Which encoders can be students: their families by transformers' names, and what differs between them."""

from __future__ import annotations

from typing import Any

# Ettin is a ModernBERT, DeBERTa-v3 is transformers' deberta-v2
ENCODER_FAMILIES = ("bert", "roberta", "xlm-roberta", "modernbert", "deberta-v2")


def refused_family(model_type: str) -> str:
    """Why a model of this family cannot be a student, and what can be done with it."""
    known = ", ".join(ENCODER_FAMILIES)
    return (
        f"a {model_type} model; students are {known}, whose export and serving are tested. It can be a teacher: "
        "build/build_cross_encoder.py publishes it as a ranker that labels"
    )


def has_token_types(config: Any) -> bool:
    """Whether the model of this configuration reads token types of two values."""
    return config.model_type == "bert" and getattr(config, "type_vocab_size", 0) > 1


def longest_input(config: Any) -> int:
    """Tokens of the longest pair that the encoder has positions for."""
    # RoBERTa and its like count positions from behind the padding token's number
    reserved = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return config.max_position_embeddings - reserved
