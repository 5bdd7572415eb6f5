"""The decoder with a score head: one state of each text, through a linear layer without bias, to one scalar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ranking.errors import InputError
from training.trainer.ranking_trainer import keep_head_exact

ALL_LINEAR = "all-linear"  # peft's word
Pooling = Literal["last_token", "mean"]


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adapters in place of training all weights (Hu et al., arXiv 2106.09685).

    Args:
        lora_rank: train LoRA adapters of this rank and the head; 0 trains everything
        lora_alpha: LoRA's scale, as a rule twice the rank
        lora_targets: all-linear, or names of the adapted modules joined by commas
        frozen_bf16: keep LoRA's frozen weights in bfloat16: half the memory
    """

    lora_rank: int = 0
    lora_alpha: int = 32
    lora_targets: str = ALL_LINEAR
    frozen_bf16: bool = False

    def __post_init__(self):
        if self.frozen_bf16 and not self.lora_rank:
            raise ValueError("frozen_bf16 is for LoRA: give lora_rank, or use precision bf16")
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            raise ValueError(
                f"lora_rank is {self.lora_rank}, lora_alpha is {self.lora_alpha}: 0 or more and above 0 are needed"
            )


def open_teacher(name: str | Path, *, reinitialise: bool = False, frozen_bf16: bool = False) -> Any:
    """A sequence classifier with one score from a decoder (new head) or from a teacher (its own head).

    reinitialise: keep the architecture, draw all weights anew; frozen_bf16: weights in bfloat16, for LoRA, whose own
    weights stay float32. InputError if it is no decoder, if a weight other than a new head's is missing, or for a LoRA
    adapter: a second one on top would be saved without the first.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise InputError(f"{name}: a LoRA adapter; training goes on from checkpoints with all weights only")
    try:
        config = AutoConfig.from_pretrained(name, num_labels=1)
        if reinitialise:
            model, missing = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32), set()
        else:
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, dtype=torch.bfloat16 if frozen_bf16 else torch.float32, output_loading_info=True
            )
            model, missing = loaded[0], set(loaded[1]["missing_keys"])
    except (OSError, ValueError) as problem:
        raise InputError(f"{name}: cannot be opened as a decoder: {' '.join(str(problem).split())[:300]}") from problem
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise InputError(f"{name}: {type(model).__name__} is no decoder with a score head")
    if missing - {"score.weight"}:
        raise InputError(f"{name}: weights are missing: {', '.join(sorted(missing - {'score.weight'}))}")
    model.score.float()
    return model


def text_config(model: Any) -> PretrainedConfig:
    """The configuration of the model's text part, which is the whole of it unless the model reads more than text."""
    return model.config.get_text_config()


def install_pooling(model: Any, pooling: Pooling) -> None:
    """Replace the model's forward by backbone, pooling by the attention mask, head in float32; weights stay.

    transformers pools the last token that is not padding by its id, which is the wrong one where pad = eos; the mask
    knows. On right- or left-padded rows of distinct pad and eos both agree
    (tests/training/teacher/test_teacher_families.py).
    """
    keep_head_exact(model)
    model.disranker_pooling = pooling
    model.forward = MethodType(_forward, model)


def _forward(self: Any, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutputWithPast:
    """input_ids, attention_mask: int64 [rows, tokens], padded on either side. Returns logits float32 [rows, 1]."""
    states = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    pool = last_state if self.disranker_pooling == "last_token" else mean_state
    return SequenceClassifierOutputWithPast(logits=self.score(pool(states, attention_mask)))


def last_state(states: Tensor, mask: Tensor) -> Tensor:
    """[rows, tokens, width] -> [rows, width]: the last token that the mask keeps, whichever side the padding is on."""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """[rows, tokens, width] -> [rows, width]: the float32 mean over the tokens that the mask keeps."""
    weights = mask[:, :, None].float()
    return (states.float() * weights).sum(1) / weights.sum(1)


def add_lora(model: Any, settings: LoraSettings) -> Any:
    """Wrap the model with LoRA adapters; the head trains whole and is saved with them.

    InputError: the model has no module of a target's name. peft itself passes over such a name beside a known one.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = [name.strip() for name in settings.lora_targets.split(",")]
    modules = [f".{name}" for name, _ in model.named_modules() if name]
    if unknown := [name for name in targets if name != ALL_LINEAR and not any(m.endswith(f".{name}") for m in modules)]:
        matrices = {
            name.rpartition(".")[0].rpartition(".")[2] for name, weight in model.named_parameters() if weight.ndim == 2
        }
        raise InputError(
            f"lora_targets: no module is called {', '.join(map(repr, unknown))}; "
            f"those with weights are {', '.join(sorted(matrices - {'score'}))}"
        )
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        modules_to_save=["score"],
    )
    try:
        return get_peft_model(model, config)
    except ValueError as problem:  # of a module that has no weights of its own
        raise InputError(f"lora_targets {settings.lora_targets}: {' '.join(str(problem).split())[:300]}") from problem
