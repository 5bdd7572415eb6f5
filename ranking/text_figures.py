"""What a student sees of real text: how many tokens its vocabulary does not know, how many fields are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranking.text import StudentFormat, normalise


@dataclass(frozen=True)
class TextFigures:
    """Shares of a sample of pairs: pairs: its size; unknown: of the tokens; cut_*: of the fields, longer than read."""

    pairs: int
    unknown: float
    cut_query: float
    cut_title: float
    cut_summary: float


def text_figures(
    text: StudentFormat, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]
) -> TextFigures:
    """Figures of pairs as `text` reads them; the three sequences have one entry per pair. ValueError for no pair."""
    if not queries:
        raise ValueError("no pair to take figures of")
    # BERT's name and XLM-R's; none where the vocabulary spells everything
    unknown_ids = [text.tokenizer.token_to_id(name) for name in ("[UNK]", "<unk>")]
    limits = text.limits
    unknown = tokens = 0
    cut = []
    for fields, limit in (
        (queries, limits.max_query_tokens), (titles, limits.max_title_tokens), (summaries, text.summary_tokens)
    ):  # fmt: skip
        # one token beyond the limit tells that there is more
        ids = text.tokenise_fields([normalise(field) for field in fields], limit + 1)
        cut.append(sum(len(field) > limit for field in ids) / len(ids))
        read = [field[:limit] for field in ids]
        tokens += sum(map(len, read))
        unknown += sum(token in unknown_ids for field in read for token in field)
    return TextFigures(len(queries), unknown / max(tokens, 1), *cut)
