"""A further target for a student: how an encoder teacher's values relate to one another inside a pair.

A score says which document is better; the relations of values between tokens say how the teacher reads the pair. A
relation is a matrix of tokens by tokens, so teacher and student may differ in width and depth, but they must read the
same tokens. Value relations of MiniLMv2 (Wang et al., arXiv 2012.15828, section 3), of the last layer of both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from ranking.card import ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.text import load_tokenizer
from training.student.encoder import StudentModel
from training.trainer.attention import fastest_attention
from training.trainer.ranking_trainer import TextLoss

LOGGER = logging.getLogger(__name__)

# the module whose output has a layer's values, in each family; of ModernBERT's output they are the last third
_VALUES = {
    "bert": "attention.self.value",
    "roberta": "attention.self.value",
    "xlm-roberta": "attention.self.value",
    "modernbert": "attn.Wqkv",
    "deberta-v2": "attention.self.value_proj",
}
_MASKED = -1e4  # as a logarithm of a share: exp of it is 0, and the difference of two is finite


@dataclass(kw_only=True)
class RelationSettings:
    """Whose value relations a student imitates beside the labels.

    Args:
        relation_teacher: ranker checkpoint of ours (baseline or student) with the student's tokenizer and limits, whose
            value relations are a further target; a deeper one than the student
        relation_weight: weight of that target beside the loss on the labels
        relation_heads: parts that values are split into before they are compared; must divide both models' widths
    """

    relation_teacher: Path | None = None
    relation_weight: float = 1.0
    relation_heads: int = 16

    def __post_init__(self):
        if not self.relation_weight > 0:
            raise ValueError(f"relation_weight is {self.relation_weight}: a positive number is needed")
        if self.relation_heads < 1:
            raise ValueError(f"relation_heads is {self.relation_heads}: at least 1 is needed")


class ValueRelations:
    """A teacher whose value relations a student imitates.

    teacher: an encoder that reads the student's token ids; weight: of the divergence; heads: see RelationSettings;
    mark: fingerprint of the teacher's weights, for the student's card.
    """

    def __init__(self, teacher: PreTrainedModel, weight: float, heads: int, mark: str = ""):
        self.teacher, self.weight, self.heads, self.mark = teacher.eval().requires_grad_(False), weight, heads, mark

    @classmethod
    def load(cls, settings: RelationSettings, student: StudentModel) -> ValueRelations | None:
        """The teacher that the settings name, None where they name none. InputError if it does not fit the student."""
        folder = settings.relation_teacher
        if folder is None:
            return None
        check_relation_teacher(settings, student)
        teacher = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        fastest_attention(teacher, student.text_format.max_tokens())
        LOGGER.info("value relations of %s, %d layers", folder, teacher.config.num_hidden_layers)
        mark = fingerprint(*sorted(folder.glob("*.safetensors")))
        return cls(teacher, settings.relation_weight, settings.relation_heads, mark)

    @contextmanager
    def text_loss_of(self, student: nn.Module) -> Iterator[TextLoss]:
        """A loss of each text that the student has just read: the weighted divergence of its value relations."""
        with _values_of(student) as of_student, _values_of(self.teacher) as of_teacher:

            def text_loss(inputs: dict[str, Tensor]) -> Tensor:
                mask = inputs["attention_mask"].bool()
                self.teacher.to(mask.device)
                with torch.no_grad():
                    self.teacher(**inputs)
                return self.weight * relation_divergence(of_student(), of_teacher(), mask, self.heads)

            yield text_loss


def relation_card(settings: RelationSettings) -> ScoreCard | None:
    """The card of the teacher that the settings name, None where they name none. InputError if it is no encoder."""
    folder = settings.relation_teacher
    if folder is None:
        return None
    card = ScoreCard.load(folder)
    if card.role not in ("student", "baseline"):
        raise InputError(
            f"{folder}: relation_teacher is a {card.role}: an encoder that reads the student's own tokens is needed, a "
            "baseline or student of ours; a decoder teaches by its labels alone"
        )
    return card


def check_relation_teacher(settings: RelationSettings, student: StudentModel) -> None:
    """InputError if the settings name a teacher that does not read what the student reads, or heads that do not fit."""
    folder, card, text_format = settings.relation_teacher, relation_card(settings), student.text_format
    if folder is None or card is None:
        return
    if card.text_format != text_format.name:
        raise InputError(f"{folder}: relation_teacher reads {card.text_format}, the student {text_format.name}")
    if load_tokenizer(folder).to_str() != text_format.tokenizer.to_str():
        raise InputError(
            f"{folder}: relation_teacher has another tokenizer than the student: start the student from a checkpoint "
            "with the same one (--init), or from scratch, where it takes the teacher's unless --tokenizer names another"
        )
    if card.limits != text_format.limits:
        raise InputError(
            f"{folder}: relation_teacher reads {card.limits}, the student {text_format.limits}: they must be equal"
        )
    for whose, config in (("relation_teacher", AutoConfig.from_pretrained(folder)), ("student", student.model.config)):
        if config.hidden_size % settings.relation_heads:
            raise InputError(
                f"relation_heads is {settings.relation_heads}, which does not divide the width of the {whose}, "
                f"{config.hidden_size}"
            )


def relation_divergence(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """float32 [rows]: Kullback-Leibler divergence of the student's value relations from the teacher's.

    student: float [rows, tokens, width]; teacher: float [rows, tokens, its width]; mask: bool [rows, tokens], which
    tokens are real. Mean over heads and real tokens, equation 9 of the paper for values alone.
    """
    with torch.autocast(mask.device.type, enabled=False):
        of_student, of_teacher = (_log_relations(values.float(), mask, heads) for values in (student, teacher))
        per_token = (of_teacher.exp() * (of_teacher - of_student)).sum(-1).mean(1)
        return (per_token * mask).sum(1) / mask.sum(1)


def _log_relations(values: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Logarithms of softmax(V V' / sqrt(width of a head)), float [rows, heads, tokens, tokens]."""
    rows, tokens, width = values.shape
    parts = values.view(rows, tokens, heads, width // heads).transpose(1, 2)
    products = parts @ parts.transpose(2, 3) / (width // heads) ** 0.5
    return products.masked_fill(~mask[:, None, None, :], _MASKED).log_softmax(-1)


@contextmanager
def _values_of(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """While it is open, a function that gives the values of the model's last layer in its last forward."""
    config: Any = model.config
    name = _VALUES[config.model_type]
    module = [module for path, module in model.named_modules() if path.endswith(name)][-1]
    seen: dict[str, Tensor] = {}
    handle = module.register_forward_hook(lambda module, inputs, output: seen.update(values=output))
    try:
        yield lambda: seen["values"][..., -config.hidden_size :]
    finally:
        handle.remove()
