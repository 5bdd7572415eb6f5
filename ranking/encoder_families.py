"""Which encoders can be students: their families by transformers' name, and why another one is refused."""

from __future__ import annotations

from typing import Any

ENCODER_FAMILIES = ("bert", "roberta", "xlm-roberta", "modernbert")  # Ettin and EuroBERT-like ModernBERTs included

_REASONS = {
    "deberta": "DeBERTa's disentangled attention gathers a position term for every two tokens, which no engine here "
    "fuses, and its published code does not export with a free length",
}


def refused_family(model_type: str) -> str:
    """Why a model of this family cannot be a student, and what can be done with it."""
    reason = _REASONS.get(model_type.partition("-")[0], "its export is not tested here")
    known = ", ".join(ENCODER_FAMILIES)
    return (
        f"a {model_type} model; students are {known}: {reason}. It can be a teacher: build/build_cross_encoder.py "
        "publishes it as a ranker that labels"
    )


def has_token_types(config: Any) -> bool:
    """Whether the model of this configuration reads token types of two values."""
    return config.model_type == "bert" and getattr(config, "type_vocab_size", 0) > 1


def longest_input(config: Any) -> int:
    """Tokens of the longest pair that the encoder has positions for."""
    # RoBERTa and its like count positions from behind the padding token's number
    reserved = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return config.max_position_embeddings - reserved
