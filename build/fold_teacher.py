"""Turn a sequence-classification teacher into a causal language model whose one token's logit is the score.

vLLM's Triton backend generates text; it has no request that returns a classifier's score. So the scalar head becomes
the row of one token A of the language-model head, all other rows are zero, and the score is the raw logit of A after
the prompt (docs/serving-teacher.md). Nothing is approximated: the logit is the same dot product with the same hidden
state.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ranking.card import ScoreCard, require_adapted
from ranking.errors import InputError
from ranking.files import write_json
from ranking.reranker_prompts import format_of_teacher
from ranking.text import TeacherFormat

LOGGER = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TOKENIZER_SETTINGS = {"bos_token", "eos_token", "pad_token", "unk_token", "model_max_length"}
PROBE = (
    ["running shoes 2024", "größe 44", "", "靴 メンズ"],
    ["</s> <s> title", "it's  a  double  space", "ﬁne ①", "👟👟"],
    ["", "a\nb\tc", "1234567890", "Ａｄｉｄａｓ"],
)
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
# Attributes by which some families bend the logit; each must leave it as it is.
LOGIT_CHANGES = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None, "lm_head_multiplier": 1.0}


@dataclass(frozen=True)
class FoldedTeacher:
    """What fold() wrote: card of the scores, the token whose logit is the score, dtype, longest prompt in tokens."""

    card: ScoreCard
    score_token_id: int
    dtype: str
    max_prompt_tokens: int


def fold(checkpoint: Path, out: Path, dtype: Dtype = "auto") -> FoldedTeacher:
    """Write the folded model, its tokenizer and its card to `out`. InputError if the checkpoint is no teacher."""
    card = ScoreCard.load(checkpoint).require(checkpoint, "teacher")
    if (card.head, card.pooling) != ("linear", "last_token"):
        raise InputError(
            f"{checkpoint}: head {card.head!r}, pooling {card.pooling!r}; a linear head on the last token is needed"
        )
    text_format = TeacherFormat.of_checkpoint(checkpoint)
    classifier = load_classifier(checkpoint, dtype)
    out.mkdir(parents=True, exist_ok=True)
    for pattern in TOKENIZER_FILES:
        for file in checkpoint.glob(pattern):
            shutil.copy2(file, out / file.name)
    return write_folded(classifier, score_row_of(classifier, checkpoint), text_format, card, out)


def write_folded(
    model: Any, score_row: torch.Tensor, text_format: TeacherFormat, card: ScoreCard, out: Path
) -> FoldedTeacher:
    """Write a model whose one token's logit is the dot product of its last hidden state with score_row, and its card.

    model: classifier or language model, changed in place; score_row: [hidden]; out: an existing folder.
    """
    tied = model.config.model_type.startswith("gemma")
    if tied:  # vLLM's Gemma classes use the embedding as the head, so A must be a token that no text contains
        token = unused_token(text_format)
    else:
        token = ordinary_token(text_format.tokenizer)
    causal = _causal_model(model, score_row, token, tied)
    causal.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)  # its sampling defaults have no meaning here
    replace(card, head="folded").save(out)
    dtype_name = str(next(causal.parameters()).dtype).removeprefix("torch.")
    return FoldedTeacher(card, token, dtype_name, text_format.max_tokens())


def write_serving_tokenizer(checkpoint: Path, out: Path) -> None:
    """Write the tokenizer for vLLM to `out`: tokenizer.json, and a config naming the class that reads it unchanged.

    vLLM opens a tokenizer by transformers' AutoTokenizer. With a config.json beside it, AutoTokenizer may choose a
    class by the model type and rebuild the tokenizer: a Qwen 2 teacher would then be served other token ids than it was
    trained on, with no error. So no config.json is written there. InputError if the ids still differ from those of
    ranking/text.py.
    """
    text_format = format_of_teacher(checkpoint)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    # transformers makes every token that a setting names special; an ordinary one would be split off in each text
    special = {token.content for token in text_format.tokenizer.get_added_tokens_decoder().values()}
    kept = {
        name: value
        for name, value in settings.items()
        if name in TOKENIZER_SETTINGS and (name == "model_max_length" or content_of(value) in special)
    }
    out.mkdir(parents=True)
    shutil.copy2(checkpoint / "tokenizer.json", out)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **kept}
    write_json(out / "tokenizer_config.json", settings)
    served = AutoTokenizer.from_pretrained(out)
    for text in text_format.texts(*PROBE):
        if served(text.text)["input_ids"] != text_format.tokenizer.encode(text.text).ids:
            raise InputError(f"{checkpoint}: transformers tokenises {text.text!r} otherwise than tokenizer.json says")


def content_of(token: Any) -> Any:
    """The text of a token as tokenizer_config.json has it: alone, or with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def load_classifier(checkpoint: Path, dtype: Dtype) -> Any:
    """The sequence-classification model of a full or LoRA checkpoint folder, the adapter merged, on the CPU."""
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    adapter = checkpoint / "adapter_config.json"
    try:
        if not adapter.is_file():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                checkpoint, dtype=wanted, num_labels=1, output_loading_info=True
            )
            missing = sorted(report["missing_keys"])
            if missing:
                raise InputError(f"{checkpoint}: weights without a value: {', '.join(missing[:3])}; is the head there?")
            return model
        return _merged_adapter(checkpoint, json.loads(adapter.read_text(encoding="utf-8")), wanted)
    except (OSError, ValueError) as problem:
        raise InputError(f"{checkpoint}: cannot be opened as a teacher: {problem}") from problem


def _merged_adapter(checkpoint: Path, settings: dict[str, Any], dtype: Any) -> Any:
    from peft import PeftModel

    base_path = require_adapted(checkpoint)
    base = AutoModelForSequenceClassification.from_pretrained(base_path, dtype=dtype, num_labels=1)
    adapted = PeftModel.from_pretrained(base, str(checkpoint))
    saved = settings.get("modules_to_save") or []
    if "score" not in saved:
        raise InputError(f"{checkpoint}: the adapter did not save its score head (modules_to_save is {saved})")
    LOGGER.info("merging the LoRA adapter into %s", base_path)
    return adapted.merge_and_unload()


def score_row_of(classifier: Any, checkpoint: Path) -> torch.Tensor:
    """The head's weight [hidden]. InputError unless the head is one linear row without bias."""
    head = getattr(classifier, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.weight.shape[0] != 1:
        raise InputError(f"{checkpoint}: {type(classifier).__name__} has no linear head `score` with one output")
    if head.bias is not None and bool(head.bias.detach().abs().max() > 0):
        raise InputError(f"{checkpoint}: the score head has a bias, which a language-model head cannot hold")
    row = head.weight.detach()[0]
    if not bool(torch.isfinite(row).all()):
        raise InputError(f"{checkpoint}: the score head has values that are not finite")
    return row


def _causal_model(model: Any, score_row: torch.Tensor, token: int, tied: bool) -> Any:
    """The language model that shares the model's body and has the score row as row `token` of its head."""
    config = model.config
    config.tie_word_embeddings = tied
    for name, neutral in LOGIT_CHANGES.items():
        if getattr(config, name, neutral) != neutral:
            LOGGER.info(
                "%s is %s in the checkpoint; set to %s, since it changes logits", name, getattr(config, name), neutral
            )
            setattr(config, name, neutral)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
    setattr(causal, causal.base_model_prefix, model.base_model)
    embedding = causal.get_input_embeddings().weight
    if tied:
        with torch.no_grad():
            embedding[token] = score_row
        causal.tie_weights()
    else:
        weight = torch.zeros(embedding.shape[0], score_row.shape[0], dtype=score_row.dtype)
        weight[token] = score_row
        # the head of Phi has a bias, which a server would make up where the checkpoint has none
        biased = causal.get_output_embeddings().bias is not None
        head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=biased, device="meta")
        head.weight = torch.nn.Parameter(weight)
        if biased:
            head.bias = torch.nn.Parameter(weight.new_zeros(len(weight)))
        causal.set_output_embeddings(head)
    config.architectures = [type(causal).__name__]
    return causal


def ordinary_token(tokenizer: Tokenizer) -> int:
    """A token that is one printable whole character, neither special nor end-of-sequence.

    An engine may hold back half a character, drop a special token or stop at the end-of-sequence token; this is none.
    """
    reserved = set(tokenizer.get_added_tokens_decoder())
    for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789":
        for text in (character, f" {character}"):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) == 1 and ids[0] not in reserved and tokenizer.decode(ids).strip() == character:
                return ids[0]
    raise InputError("the tokenizer has no token that is a single letter or digit, so no token can carry the score")


def unused_token(text_format: TeacherFormat) -> int:
    """An added token that no teacher text contains: field text cannot spell it, the layout does not use it."""
    tokenizer = text_format.tokenizer
    (sample,) = text_format.texts(["a"], ["a"], ["a"])
    layout = set(tokenizer.encode(sample.text).ids)
    for number, added in sorted(tokenizer.get_added_tokens_decoder().items()):
        if number not in layout and len(added.content.strip()) > 1 and "unused" in added.content:
            return number
    raise InputError("this model family ties its head to its embedding, and the tokenizer has no <unused> token for it")
