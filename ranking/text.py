"""The one place where (query, title, summary) becomes model input, for training and serving alike.

Teacher, both training stages and the vLLM prompt:

    Query: <query>\\nTitle: <title>\\nSummary: <summary></s>

The query comes first, so that a prefix cache serves all candidates of a query; the end-of-sequence token comes last,
and its state is the pair's representation. The teacher's input is a string, because the stock vLLM backend takes text.

Student and baseline: `[CLS] query [SEP] title summary [SEP]` with token types 0 and 1, built from token ids; for
encoders other than BERT with the marks of their own tokenizer, and without token types where it has none.

A summary beyond the student's limit is cut there, or read as several chunks, each a pair of its own
(ranking/chunks.py).

Every field is normalised (NFKC, control characters and line breaks to single spaces), has special-token text
neutralised ("</s>" in a document becomes "< /s>"), and is cut to its own token limit, so that a long query can never
push the document or the final token out.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from ranking.card import ScoreCard, fingerprint
from ranking.chunks import Chunking, Pooling, pool
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.visible import SEPARATORS, python_class

TEACHER_FORMAT = "query-title-summary-eos"
STUDENT_FORMAT = "cls-query-sep-title-summary-sep"
PAIR_FORMAT = "tokenizer-pair-query-title-summary"
FORMAT_VERSION = 1

# An over-long field is cut to this many characters per allowed token before it is tokenised: 5 MB of text costs
# nothing.
CHARACTERS_PER_TOKEN = 64

_SEPARATORS = re.compile(f"[{python_class(SEPARATORS)}]+")


def normalise(text: str) -> str:
    """NFKC, each run of white space, control characters and halves of surrogate pairs to one space, none at the ends.

    Visible text stays visible and invisible text stays invisible (ranking.visible).
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _SEPARATORS.sub(" ", text).strip(" ")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The fast tokenizer of a checkpoint folder (tokenizer.json), its stored truncation and padding switched off."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder}: no tokenizer.json; a fast tokenizer is needed")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as problem:  # the Rust side raises plain Exception
        raise InputError(f"{path}: cannot be read as a tokenizer: {problem}") from problem
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class FieldCleaner:
    """normalise() plus neutralised special tokens for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        contents = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        # one character cannot be split by a space, and a token of white space has no role in a model's input
        spelled = sorted((c for c in contents if len(c.strip()) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, spelled)), re.IGNORECASE) if spelled else None

    def __call__(self, text: str, token_limit: int) -> str:
        """The clean text of a field, cut to what token_limit tokens could ever hold."""
        text = normalise(text[: 4 * token_limit * CHARACTERS_PER_TOKEN])[: token_limit * CHARACTERS_PER_TOKEN]
        while self._special is not None and self._special.search(text):
            # repeated: a token that is broken up may leave another one behind ("<</s>/s>")
            text = self._special.sub(_broken_up, text)
        return text


def _broken_up(token: re.Match[str]) -> str:
    """A special token with a space behind its first letter; behind a space that it begins with, it would stay whole."""
    first = len(token[0]) - len(token[0].lstrip()) + 1
    return f"{token[0][:first]} {token[0][first:]}"


@dataclass(frozen=True)
class TeacherText:
    """One teacher input: the text, and the index of the character where the document (what stage 1 predicts) starts."""

    text: str
    document_start_character: int


@dataclass(frozen=True)
class EncodedPair:
    """One pair as token ids, without padding, and the index of the document's first token.

    Of a student's pair, the tokens before document_start ([CLS] query [SEP]) have token type 0, the others type 1. Of a
    teacher's pair, the tokens from document_start on are those that stage 1 predicts.
    """

    ids: list[int]
    document_start: int


@dataclass(frozen=True)
class EncodedPairs:
    """Many pairs as token ids, one pair after the other without padding: what a server fills its tensors from.

    ids: int32 [tokens]; lengths, document_starts: int64 [n], of each pair as in EncodedPair.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]
    document_starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, pairs: Sequence[EncodedPair]) -> EncodedPairs:
        """The same pairs in one array."""
        lengths = np.fromiter((len(pair.ids) for pair in pairs), np.int64, len(pairs))
        ids = np.fromiter(chain.from_iterable(pair.ids for pair in pairs), np.int32, int(lengths.sum()))
        return cls(ids, lengths, np.fromiter((pair.document_start for pair in pairs), np.int64, len(pairs)))

    def split(self) -> list[EncodedPair]:
        """The same pairs, each with a list of its own."""
        ids, ends = self.ids.tolist(), np.cumsum(self.lengths).tolist()
        starts = self.document_starts.tolist()
        return [EncodedPair(ids[begin:end], start) for begin, end, start in zip([0, *ends], ends, starts)]

    def take(self, rows: ArrayLike) -> EncodedPairs:
        """The pairs of these row numbers, int [m], in their order."""
        chosen = np.asarray(rows, np.int64)
        lengths = self.lengths[chosen]
        # where each pair begins here, less where it will begin
        shift = (np.cumsum(self.lengths) - self.lengths)[chosen] - (np.cumsum(lengths) - lengths)
        places = np.repeat(shift, lengths) + np.arange(lengths.sum())
        return EncodedPairs(self.ids[places], lengths, self.document_starts[chosen])


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents with their queries as encoded pairs: one pair for each chunk that is read of a document.

    together: [m] pairs; starts: int64 [n + 1], document d has the pairs starts[d]..starts[d + 1]; pooling: how a
    document's score is made of its pairs' scores.
    """

    together: EncodedPairs
    starts: NDArray[np.int64]
    pooling: Pooling

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def pairs(self) -> list[EncodedPair]:
        """The pairs, [m], each with a list of its own."""
        return self.together.split()

    @property
    def chunks(self) -> NDArray[np.int32]:
        """How many chunks are read of each document, int32 [n]."""
        return np.diff(self.starts).astype(np.int32)

    def pool(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores of the documents, float32 [n], of scores of the pairs, float32 [m]."""
        return pool(scores, self.starts, self.pooling)


class TeacherFormat:
    """Turns fields into teacher text for one tokenizer. Light: needs `tokenizers` only, no torch or transformers.

    tokenizer: the checkpoint's fast tokenizer; eos: its end-of-sequence token as text; limits: tokens per field.
    InputError if eos is not one special token of the tokenizer, since the pair would then be pooled elsewhere.
    """

    def __init__(self, tokenizer: Tokenizer, eos: str, limits: FieldLimits):
        self.tokenizer, self.eos, self.limits = tokenizer, eos, limits
        self._clean = FieldCleaner(tokenizer)
        eos_id = tokenizer.token_to_id(eos)
        if eos_id is None or tokenizer.encode(eos, add_special_tokens=False).ids != [eos_id]:
            raise InputError(f"the end-of-sequence token {eos!r} is not one special token of the tokenizer")
        self.eos_id = eos_id
        # some tokenizers append it themselves; a second one would not be what training saw
        self._appended = "" if tokenizer.encode("a").ids[-1] == eos_id else eos

    @classmethod
    def of_checkpoint(cls, folder: str | Path) -> TeacherFormat:
        """The format of a teacher checkpoint folder, with the limits of its card. InputError on any mismatch."""
        card = ScoreCard.load(folder).require(folder, "pretrained", "teacher")
        check_format(card, TEACHER_FORMAT, folder)
        config_path = Path(folder) / "tokenizer_config.json"
        try:
            eos = json.loads(config_path.read_text(encoding="utf-8"))["eos_token"]
        except (OSError, ValueError, KeyError) as problem:
            raise InputError(f"{config_path}: no eos_token: {problem}") from problem
        return cls(load_tokenizer(folder), eos["content"] if isinstance(eos, dict) else eos, card.limits)

    def max_tokens(self) -> int:
        """Upper bound of a pair's length in tokens: field limits, the layout's words, begin and end tokens."""
        layout = self.tokenizer.encode(self._lay_out("", "", "").text).ids
        # a space that belongs to no word may become a token of its own at each field
        return self.limits.total_tokens() + len(layout) + 3

    def texts(self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> list[TeacherText]:
        """One TeacherText per row. The three sequences have one entry per pair."""
        fields = [
            *self._cut(queries, self.limits.max_query_tokens),
            *self._cut(titles, self.limits.max_title_tokens),
            *self._cut(summaries, self.limits.max_summary_tokens),
        ]
        n = len(queries)
        return [self._lay_out(fields[i], fields[n + i], fields[2 * n + i]) for i in range(n)]

    def encode(self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> list[EncodedPair]:
        """One EncodedPair per row; the ids are what a server makes of the same text."""
        texts = self.texts(queries, titles, summaries)
        pairs = []
        for text, encoding in zip(texts, self.tokenizer.encode_batch([text.text for text in texts])):
            # a token that spans the border holds document characters; offsets of special tokens at the front are (0, 0)
            start = next(i for i, (_, end) in enumerate(encoding.offsets) if end > text.document_start_character)
            pairs.append(EncodedPair(encoding.ids, start))
        return pairs

    def _lay_out(self, query: str, title: str, summary: str) -> TeacherText:
        prompt = f"Query: {query}\nTitle:"
        return TeacherText(f"{prompt} {title}\nSummary: {summary}{self._appended}", len(prompt))

    def fields(
        self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]
    ) -> tuple[list[str], list[str]]:
        """(queries, documents), a document being title and summary: cut to their limits, special tokens neutralised."""
        limits = self.limits
        cut = zip(self._cut(titles, limits.max_title_tokens), self._cut(summaries, limits.max_summary_tokens))
        return self._cut(queries, limits.max_query_tokens), [f"{title} {summary}".strip() for title, summary in cut]

    def _cut(self, raw: Sequence[str], limit: int) -> list[str]:
        distinct = {text: self._clean(text, limit) for text in dict.fromkeys(raw)}
        long = [text for text, clean in distinct.items() if len(clean) > limit or not clean.isascii()]
        encoded = self.tokenizer.encode_batch([distinct[text] for text in long], add_special_tokens=False)
        for text, encoding in zip(long, encoded):
            distinct[text] = self._cut_one(distinct[text], encoding.offsets, limit)
        return [distinct[text] for text in raw]

    def _cut_one(self, text: str, offsets: list[tuple[int, int]], limit: int) -> str:
        """Cut so that the text itself, tokenised again, has at most limit tokens: a cut can change the last merge."""
        while len(offsets) > limit:
            end = offsets[limit - 1][1]
            if end >= len(text):  # several tokens share the last character: give it up
                end = min(offsets[limit][0], len(text) - 1)
            text = text[:end].rstrip()
            offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return text


TokenIds = Sequence[int] | NDArray[np.int32]  # of one field


class StudentFormat:
    """Turns fields into a student's inputs for one tokenizer: `[CLS] query [SEP] title summary [SEP]`.

    Built from ids, not by the tokenizer's own pair template, so that every field keeps its own limit. The query is
    tokenised once however many documents it has.

    chunking: how a summary beyond its limit is read; field_ids: what tokenises fields, tokenise_fields() unless a
    caller puts a cache before it; token_types: whether the tokens from document_start on have the type 1, or the
    encoder has no types. InputError if chunks overlap by their whole length.
    """

    name = STUDENT_FORMAT
    token_types = True

    def __init__(self, tokenizer: Tokenizer, limits: FieldLimits, chunking: Chunking | None = None):
        self.tokenizer, self.limits, self.chunking = tokenizer, limits, chunking or Chunking()
        try:
            # tokens of a summary that are read, in however many chunks
            self.summary_tokens = self.chunking.summary_tokens(limits.max_summary_tokens)
        except ValueError as problem:
            raise InputError(str(problem)) from problem
        self.field_ids: Callable[[Sequence[str], int], Sequence[TokenIds]] = self.tokenise_fields
        self._clean = FieldCleaner(tokenizer)
        self.pad_id = 0
        self.marks = Marks([], [], [])
        self._read_marks()

    def _read_marks(self) -> None:
        names = ("[CLS]", "[SEP]", "[PAD]")
        ids = [number for name in names if (number := self.tokenizer.token_to_id(name)) is not None]
        if len(ids) < len(names):
            missing = [name for name in names if self.tokenizer.token_to_id(name) is None]
            raise InputError(f"the tokenizer has no {', '.join(missing)}: not a BERT tokenizer")
        cls_id, sep_id, self.pad_id = ids
        self.marks = Marks([cls_id], [sep_id], [sep_id])

    @property
    def cls_id(self) -> int:
        """The mark that a pair begins with."""
        return self.marks.first[0]

    @property
    def sep_id(self) -> int:
        """The mark that a pair ends with."""
        return self.marks.last[-1]

    @staticmethod
    def of_checkpoint(folder: str | Path) -> StudentFormat:
        """The format of a student or baseline checkpoint folder, with its card's limits. InputError on a mismatch."""
        card = ScoreCard.load(folder).require(folder, "student", "baseline")
        kind = PairFormat if card.text_format == PAIR_FORMAT else StudentFormat
        check_format(card, kind.name, folder)
        return kind(load_tokenizer(folder), card.limits, card.chunking)

    def max_tokens(self) -> int:
        """Upper bound of a pair's length in tokens: field limits and marks."""
        return self.limits.total_tokens() + sum(map(len, (self.marks.first, self.marks.between, self.marks.last)))

    def encode(self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> list[EncodedPair]:
        """One EncodedPair per row; the three sequences have one entry per pair.

        InputError if this format reads several chunks of a document, which encode_documents() gives.
        """
        return self.encode_together(queries, titles, summaries).split()

    def encode_together(self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> EncodedPairs:
        """The same in one array."""
        if self.chunking.most > 1:
            raise InputError(f"up to {self.chunking.most} chunks are read of a document: one pair is not all of it")
        return self.encode_documents(queries, titles, summaries).together

    def encode_documents(
        self,
        queries: Sequence[str],
        titles: Sequence[str],
        summaries: Sequence[str],
        most_chunks: int | None = None,
    ) -> EncodedDocuments:
        """All that is read of each row's document; the three sequences have one entry per document.

        most_chunks: read so many chunks of a document, if that is fewer than the format's own number.
        """
        return self.join(*self.tokenise(queries, titles, summaries), most_chunks)

    def tokenise(
        self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]
    ) -> tuple[Sequence[TokenIds], Sequence[TokenIds], Sequence[TokenIds]]:
        """Token ids of queries, titles and summaries at their places, without the pair's marks.

        Each is cut to what is read of it, a summary to summary_tokens.
        """
        queries, titles, summaries = self._placed(queries, titles, summaries)
        return (
            self.field_ids(queries, self.limits.max_query_tokens),
            self.field_ids(titles, self.limits.max_title_tokens),
            self.field_ids(summaries, self.summary_tokens),
        )

    def join(
        self,
        query_ids: Sequence[TokenIds],
        title_ids: Sequence[TokenIds],
        summary_ids: Sequence[TokenIds],
        most_chunks: int | None = None,
    ) -> EncodedDocuments:
        """Documents whose fields are tokenised already, as tokenise() gives them; one entry of each per document.

        What is beyond the last chunk of a summary is left out; most_chunks: as of encode_documents().
        """
        spans = [self.chunking.spans(len(ids), self.limits.max_summary_tokens)[:most_chunks] for ids in summary_ids]
        documents = [document for document, own in enumerate(spans) for _ in own]  # of each pair
        marks, m = self.marks, len(documents)
        parts: list[TokenIds] = [marks.first, [], marks.between, [], [], marks.last] * m
        parts[1::6] = [query_ids[document] for document in documents]
        parts[3::6] = [title_ids[document] for document in documents]
        parts[4::6] = [ids[start:end] for ids, own in zip(summary_ids, spans) for start, end in own]
        lengths = np.fromiter(map(len, parts), np.int64, 6 * m).reshape(m, 6)
        ids = np.concatenate([np.asarray(part, np.int32) for part in parts]) if m else np.empty(0, np.int32)
        pairs = EncodedPairs(ids, lengths.sum(1), lengths[:, :3].sum(1))
        starts = np.cumsum([0, *map(len, spans)], dtype=np.int64)
        return EncodedDocuments(pairs, starts, self.chunking.pooling)

    def _placed(
        self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]
    ) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
        """The fields as they are tokenised at their places; BERT's tokenizer reads a word alike everywhere."""
        return queries, titles, summaries

    def tokenise_fields(self, raw: Sequence[str], limit: int) -> list[list[int]]:
        """Token ids of each field, no special tokens, cut to `limit`; a field that comes twice is tokenised once."""
        distinct = list(dict.fromkeys(raw))
        texts = [self._field_text(text, limit) for text in distinct]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = {text: encoding.ids[:limit] for text, encoding in zip(distinct, encoded)}
        return [ids[text] for text in raw]

    def _field_text(self, raw: str, limit: int) -> str:
        return self._clean(raw, limit)


@dataclass(frozen=True)
class Marks:
    """Token ids that stand before the query, between query and document, and behind the document."""

    first: list[int]
    between: list[int]
    last: list[int]


class PairFormat(StudentFormat):
    """The same for encoders that are no BERT (XLM-R, ModernBERT, DeBERTa): marks of their tokenizer's own, no types.

    A summary is tokenised with the space that stands between it and its title, which a byte-level tokenizer makes a
    part of the word: so the ids are those of `title summary` as one text. InputError if the tokenizer has no template
    for pairs or no padding token.
    """

    name = PAIR_FORMAT
    token_types = False

    def _read_marks(self) -> None:
        pads = [number for name in ("[PAD]", "<pad>") if (number := self.tokenizer.token_to_id(name)) is not None]
        if not pads:
            raise InputError("the tokenizer has no padding token ([PAD] or <pad>), so documents cannot be batched")
        self.pad_id = pads[0]
        pair = self.tokenizer.encode("a", "b")
        texts = [index for index, text in enumerate(pair.sequence_ids) if text is not None]
        first = [index for index in texts if pair.sequence_ids[index] == 0]
        second = [index for index in texts if pair.sequence_ids[index] == 1]
        if self.tokenizer.num_special_tokens_to_add(True) < 2 or not first or not second:
            raise InputError("the tokenizer has no template for pairs: it does not mark where the document begins")
        ids = pair.ids
        self.marks = Marks(ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :])

    def _placed(
        self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]
    ) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
        """A field that begins with a space is a summary behind a title; no other field does."""
        placed = [f" {s.lstrip()}" if t.strip() else s.lstrip() for t, s in zip(titles, summaries)]
        return [q.lstrip() for q in queries], [t.lstrip() for t in titles], placed

    def _field_text(self, raw: str, limit: int) -> str:
        clean = self._clean(raw, limit)
        return f" {clean}" if clean and raw.startswith(" ") else clean


def check_format(card: ScoreCard, name: str, folder: str | Path) -> None:
    """InputError unless the card names this text format, at this version, and the tokenizer that lies in the folder."""
    if (card.text_format, card.format_version) != (name, FORMAT_VERSION):
        raise InputError(
            f"{folder}: text format {card.text_format!r} version {card.format_version}, "
            f"this release writes {name!r} version {FORMAT_VERSION}; train again or use the matching release"
        )
    tokenizer_file = Path(folder) / "tokenizer.json"
    if card.vocabulary and tokenizer_file.is_file() and fingerprint(tokenizer_file) != card.vocabulary:
        raise InputError(f"{tokenizer_file}: not the tokenizer that the score card names; its token ids would differ")
