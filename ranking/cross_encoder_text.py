"""The text of encoder rerankers that others trained: a pair by the template of the model's own tokenizer.

BERT, RoBERTa, XLM-R, ModernBERT and their like read `[CLS] query [SEP] document [SEP]`, each with its own marks, which
its tokenizer's file holds. Fields are cut to their token limits and their special tokens are neutralised as in
ranking/text.py; a document is its title, one space and its summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.text import EncodedPair, FieldCleaner, TeacherFormat, check_format, load_tokenizer

CROSS_ENCODER_FORMAT = "query-document-pair"


class CrossEncoderFormat(TeacherFormat):
    """Turns fields into the token ids of a foreign encoder reranker. It needs `tokenizers` only.

    tokenizer: the reranker's own; limits: tokens per field. InputError if it has no template for pairs.
    """

    def __init__(self, tokenizer: Tokenizer, limits: FieldLimits):
        self.tokenizer, self.limits = tokenizer, limits
        self._clean = FieldCleaner(tokenizer)
        if tokenizer.num_special_tokens_to_add(True) < 2:
            raise InputError(
                "the tokenizer has no template for pairs; an encoder reranker's tokenizer marks both texts"
            )

    @classmethod
    def of_checkpoint(cls, folder: str | Path) -> CrossEncoderFormat:
        """The format of a published encoder's folder, with the limits of its card. InputError on a mismatch."""
        card = ScoreCard.load(folder).require(folder, "teacher")
        check_format(card, CROSS_ENCODER_FORMAT, folder)
        return cls(load_tokenizer(folder), card.limits)

    def max_tokens(self) -> int:
        """Upper bound of a pair's length in tokens: field limits, the template's marks, one for each join of fields."""
        marks = self.tokenizer.num_special_tokens_to_add(True)
        return self.limits.total_tokens() + marks + 3

    def encode(self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> list[EncodedPair]:
        """One EncodedPair per row, marks included; the three sequences have one entry per pair.

        document_start is where the tokenizer's token types turn to 1; the end where it has no types.
        """
        encoded = self.tokenizer.encode_batch(list(zip(*self.fields(queries, titles, summaries))))
        return [EncodedPair(each.ids, [*each.type_ids, 1].index(1)) for each in encoded]
