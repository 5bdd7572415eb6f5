"""The prompts of rerankers that others trained: where query and document go, and which answers make the score.

Such a model is asked a question and its score is read off the logits of the first token of its answer. Each prompt here
is the text of the model's own published code, cited in its `source`. Fields are cut to their token limits and their
special tokens are neutralised as in ranking/text.py; a document is its title, one space and its summary.

The published code of some models tokenises a prompt piece by piece and joins the ids. Joined as text, pieces would
merge at their borders (Qwen has one token for a full stop with a line break), and a server takes text. So a private
character stands between the pieces, and the published tokenizer splits there and drops it: the server makes exactly the
published code's ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ranking.card import ScoreCard
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.text import (
    TEACHER_FORMAT,
    FieldCleaner,
    TeacherFormat,
    TeacherText,
    check_format,
    load_tokenizer,
)

BORDER = "\ue000"  # of Unicode's private use area; field text cannot contain it


@dataclass(frozen=True)
class RerankerPrompt:
    """The text that one family of rerankers was trained on.

    Args:
        name: name of the text format, as score cards have it
        source: where the text and the reading of the score are published
        pieces: the text in the pieces that the published code tokenises one by one; {query}, {document} and
            {instruction} are filled in
        instruction: what {instruction} says unless the user says something else; empty means that the piece
            `instructed` is left out
        instructed: what stands directly before the query's piece where an instruction is given and `pieces` has no
            place
        marks: role tokens of the text, each one token of the model's tokenizer
        begin: token that the tokenizer itself puts first, empty if it must put none
        yes: the answer whose logit speaks for the document
        no: the answer whose logit is subtracted, None if the model's score is the logit of `yes` alone
    """

    name: str
    source: str
    pieces: tuple[str, ...]
    yes: str
    no: str | None
    marks: tuple[str, ...] = ()
    begin: str = ""
    instruction: str = ""
    instructed: str = ""

    def takes_instruction(self) -> bool:
        """Whether the text has a place for an instruction."""
        return bool(self.instructed) or any("{instruction}" in piece for piece in self.pieces)

    def fill(self, query: str, document: str, instruction: str = "") -> list[str]:
        """The pieces with the fields filled in. InputError for an instruction without a place."""
        instruction = instruction or self.instruction
        if instruction and not self.takes_instruction():
            raise InputError(f"{self.name}: the model's prompt has no place for an instruction; leave it out")
        filled = []
        for piece in self.pieces:
            if instruction and self.instructed and "{query}" in piece:
                piece = self.instructed + piece
            filled.append(piece.format(query=query, document=document, instruction=instruction))
        return filled


QWEN3_RERANKER = RerankerPrompt(
    name="qwen3-reranker",
    source="model card of Qwen/Qwen3-Reranker-0.6B, `format_instruction`, `process_inputs` and `compute_logits`: "
    'score = softmax over the logits of "no" and "yes", so its logit is yes - no (arXiv 2506.05176)',
    pieces=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    yes="yes",
    no="no",
    marks=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    instruction="Given a web search query, retrieve relevant passages that answer the query",
)
BGE_RERANKER_GEMMA = RerankerPrompt(
    name="bge-reranker-gemma",
    source='model card of BAAI/bge-reranker-v2-gemma, `get_inputs`: score = logit of "Yes"; the begin token that the '
    "published code puts first is added by the tokenizer itself",
    pieces=(
        "A: {query}",
        "\n",
        "B: {document}",
        "\n",
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'.",
    ),
    yes="Yes",
    no=None,
    begin="<bos>",
)
MXBAI_RERANK = RerankerPrompt(
    name="mxbai-rerank-v2",
    source="mixedbread-ai/mxbai-rerank, mxbai_rerank/mxbai_rerank_v2.py, `prepare_inputs` and `forward`: "
    'score = logit of "1" - logit of "0"',
    pieces=(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n",
        "query: {query}",
        "\n",
        "document: {document}",
        "\n",
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    yes="1",
    no="0",
    marks=("<|im_start|>", "<|im_end|>"),
    instructed="instruction: {instruction}\n",
)
PROMPTS = {prompt.name: prompt for prompt in (QWEN3_RERANKER, BGE_RERANKER_GEMMA, MXBAI_RERANK)}


def split_at_borders(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of the tokenizer that splits at BORDER and drops it, before it does anything else with the text."""
    state = json.loads(tokenizer.to_str())
    split = {"type": "Split", "pattern": {"String": BORDER}, "behavior": "Removed", "invert": False}
    own = state["pre_tokenizer"]
    parts = [] if own is None else own["pretokenizers"] if own["type"] == "Sequence" else [own]
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, *(part for part in parts if part != split)]}
    return Tokenizer.from_str(json.dumps(state))


class _BorderCleaner(FieldCleaner):
    """FieldCleaner that also keeps BORDER out of fields."""

    def __call__(self, text: str, token_limit: int) -> str:
        return super().__call__(text.replace(BORDER, " "), token_limit)


class PromptFormat(TeacherFormat):
    """Turns fields into a foreign reranker's prompt; used as TeacherFormat is, and it needs `tokenizers` only.

    tokenizer: the reranker's own, made by split_at_borders; limits: tokens per field; instruction: of the prompt, empty
    for the model's own. InputError if the tokenizer reads a prompt otherwise than the published code reads its pieces,
    or adds a token behind it: the score would then be read off another state than the model was trained on.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: RerankerPrompt, limits: FieldLimits, instruction: str = ""):
        self.tokenizer, self.prompt, self.limits, self.instruction = tokenizer, prompt, limits, instruction
        self._clean = _BorderCleaner(tokenizer)
        self._check_pieces()

    @classmethod
    def of_checkpoint(cls, folder: str | Path) -> PromptFormat:
        """The format of a published foreign teacher's folder, as its card says. InputError on any mismatch."""
        card = ScoreCard.load(folder).require(folder, "teacher")
        prompt = PROMPTS.get(card.text_format)
        if prompt is None:
            raise InputError(f"{folder}: text format {card.text_format!r}; known are {', '.join(PROMPTS)}")
        check_format(card, prompt.name, folder)
        return cls(load_tokenizer(folder), prompt, card.limits, card.instruction)

    def answer_ids(self) -> tuple[int, int | None]:
        """Token ids of the answers yes and no. InputError if an answer is not one token of the tokenizer."""
        no = self.prompt.no
        return self._answer_id(self.prompt.yes), None if no is None else self._answer_id(no)

    def texts(self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> list[TeacherText]:
        """One TeacherText per row. The three sequences have one entry per pair."""
        return [self._fill(query, document) for query, document in zip(*self.fields(queries, titles, summaries))]

    def _lay_out(self, query: str, title: str, summary: str) -> TeacherText:
        return self._fill(query, f"{title} {summary}".strip())

    def _fill(self, query: str, document: str) -> TeacherText:
        text = BORDER.join(self.prompt.fill(query, document, self.instruction))
        behind = len(BORDER.join(self.prompt.pieces).rpartition("{document}")[2])
        return TeacherText(text, len(text) - behind - len(document))

    def _answer_id(self, answer: str) -> int:
        ids = self.tokenizer.encode(answer, add_special_tokens=False).ids
        if len(ids) != 1:
            raise InputError(
                f"{self.prompt.name}: the answer {answer!r} is {len(ids)} tokens; this is another tokenizer"
            )
        return ids[0]

    def _check_pieces(self) -> None:
        name, tokenizer = self.prompt.name, self.tokenizer
        roles = [mark for mark in (*self.prompt.marks, self.prompt.begin) if mark]
        if missing := [mark for mark in roles if tokenizer.token_to_id(mark) is None]:
            raise InputError(f"{name}: the tokenizer has no token {', '.join(missing)}; it is another model's")
        first = [tokenizer.token_to_id(self.prompt.begin)] if self.prompt.begin else []
        for query, document in (("running shoes", "Light shoes. A light shoe."), ("größe 44", "靴 (2024)"), ("", "")):
            pieces = self.prompt.fill(query, document, self.instruction)
            apart = [n for piece in pieces for n in tokenizer.encode(piece, add_special_tokens=False).ids]
            if tokenizer.encode(BORDER.join(pieces)).ids != first + apart:
                raise InputError(
                    f"{name}: the tokenizer reads the prompt otherwise than the published code; is it its own?"
                )


def format_of_teacher(folder: str | Path) -> TeacherFormat:
    """The text format of any teacher's folder: this project's own, or a foreign reranker's prompt, as its card says."""
    card = ScoreCard.load(folder)
    return (TeacherFormat if card.text_format == TEACHER_FORMAT else PromptFormat).of_checkpoint(folder)
