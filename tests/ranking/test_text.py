"""Whatever fields hold, the model's text keeps its layout, its limits and its final token."""

from __future__ import annotations

import json
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

from ranking.card import ScoreCard, fingerprint
from ranking.errors import InputError
from ranking.limits import FieldLimits
from ranking.text import (
    FORMAT_VERSION,
    TEACHER_FORMAT,
    EncodedPair,
    EncodedPairs,
    PairFormat,
    StudentFormat,
    TeacherFormat,
    load_tokenizer,
    normalise,
)
from tests.helpers.trained_tokenizers import byte_level, word_piece

SENTENCES = [
    "Query: running shoes\nTitle: Light running shoes\nSummary: cushioned and breathable",
    "größe 44 跑步鞋 ☕",
]
LIMITS = FieldLimits(max_query_tokens=6, max_title_tokens=5, max_summary_tokens=12)
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
NASTY = ["</s>", "<s>", "<</s>/s>", "< /s>", "<pad>", "[SEP]", "[CLS]", "[sep]", "[[SEP]SEP]", "[PAD]", "[MASK]",
         "\nTitle: x", "Summary:", "Query: ", "\x00", "\x1b[31m", "\u2028", "\ufeff", "\u200b", "\ud800", "\udfff", "ﷺ",
         "☕", "👩‍👩‍👧", "é", "e\u0301", "ｆｕｌｌ", "…", "\u3000", "\t\r\n"]  # fmt: skip
field_text = st.lists(st.text(max_size=12) | st.sampled_from(NASTY), max_size=12).map("".join)


def adding_bos() -> Tokenizer:
    """As Llama 3: byte-level BPE; <s> in front is the tokenizer's own doing."""
    tokenizer = byte_level(SENTENCES, 350, SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2, Mistral and Gemma: words marked by a leading underscore, unknown letters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIALS + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    saved = json.loads(tokenizer.to_str())
    # byte tokens are vocabulary, not marks: the trainer only knows how to reserve them as special ones
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in SPECIALS]
    saved["model"] |= {"byte_fallback": True, "unk_token": "<unk>"}
    return Tokenizer.from_str(json.dumps(saved))


def appending() -> Tokenizer:
    """A tokenizer that ends every text with </s> itself."""
    tokenizer = adding_bos()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


TEACHERS = {make.__name__: TeacherFormat(make(), "</s>", LIMITS) for make in (adding_bos, metaspace, appending)}
STUDENT = StudentFormat(word_piece(SENTENCES, 150), LIMITS)


@given(st.text() | field_text)
@settings(max_examples=300, deadline=None)
def test_normalised_text_is_clean_and_stays_so(text):
    clean = normalise(text)
    assert normalise(clean) == clean
    assert clean == clean.strip() and "  " not in clean
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in clean)
    clean.encode("utf-8")


def test_normalisation_worked_by_hand():
    assert normalise(" Ｆｕｌｌ\u3000width\t\r\n ﬁne\x00é ") == "Full width fine é"
    assert normalise("e\u0301") == "é"
    assert normalise("a\ud800b") == "a b"
    assert normalise("\x00\ufeff\u2028") == ""


@pytest.mark.parametrize("name", TEACHERS)
@given(query=field_text, title=field_text, summary=field_text)
@settings(max_examples=80, deadline=None)
def test_a_teacher_text_ends_in_its_only_end_token_within_its_limits(name, query, title, summary):
    layout = TEACHERS[name]
    tokenizer = layout.tokenizer
    [found] = layout.texts([query], [title], [summary])
    ids = tokenizer.encode(found.text).ids
    specials = [i for i in ids if i in {tokenizer.token_to_id(mark) for mark in ("<pad>", "<s>", "</s>")}]
    expected = [tokenizer.token_to_id("<s>")] if name == "adding_bos" else []
    assert specials == [*expected, layout.eos_id] and ids[-1] == layout.eos_id
    assert len(ids) <= layout.max_tokens()
    # nothing in the query can move the document out: its part starts where it should, whole
    assert found.text.startswith("Query: ") and found.text.count("\n") == 2
    document = found.text[found.document_start_character :]
    assert document.startswith(" ") and "\nSummary: " in document
    [empty] = layout.texts([""], [title], [summary])
    assert empty.text[empty.document_start_character :] == document


@pytest.mark.parametrize("name", TEACHERS)
@given(field_text)
@settings(max_examples=60, deadline=None)
def test_a_field_is_cut_to_its_own_limit(name, text):
    layout = TEACHERS[name]
    [found] = layout.texts([text], [""], [""])
    cut = found.text[len("Query: ") : found.document_start_character - len("\nTitle:")]
    # a word marker in front of the field alone may take a token that the text in its place does not need
    assert len(layout.tokenizer.encode(cut, add_special_tokens=False).ids) <= LIMITS.max_query_tokens + (
        name == "metaspace"
    )
    assert not cut or cut[0] == (normalise(text) or " ")[0]


@given(st.lists(st.tuples(field_text, field_text, field_text), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_text_does_not_depend_on_its_neighbours(rows):
    queries, titles, summaries = zip(*rows)
    for layout in TEACHERS.values():
        together = layout.texts(queries, titles, summaries)
        assert together == [layout.texts([q], [t], [s])[0] for q, t, s in rows]
    together = STUDENT.encode(queries, titles, summaries)
    assert together == [STUDENT.encode([q], [t], [s])[0] for q, t, s in rows]


@given(query=field_text, title=field_text, summary=field_text)
@settings(max_examples=150, deadline=None)
def test_a_student_input_keeps_its_layout(query, title, summary):
    [pair] = STUDENT.encode([query], [title], [summary])
    cls, sep, pad = STUDENT.cls_id, STUDENT.sep_id, STUDENT.pad_id
    assert pair.ids[0] == cls and pair.ids[-1] == sep
    assert pair.ids.count(cls) == 1 and pair.ids.count(sep) == 2 and pad not in pair.ids
    first = pair.ids.index(sep)
    assert pair.document_start == first + 1
    assert (
        first - 1 <= LIMITS.max_query_tokens
        and len(pair.ids) - first - 2 <= LIMITS.max_title_tokens + LIMITS.max_summary_tokens
    )
    assert len(pair.ids) <= STUDENT.max_tokens()


def test_the_layouts_worked_by_hand():
    [text] = TEACHERS["adding_bos"].texts(["running shoes"], ["Light"], ["</s> cushioned"])
    assert text.text == "Query: running shoes\nTitle: Light\nSummary: < /s> cushioned</s>"
    assert text.text[text.document_start_character :] == " Light\nSummary: < /s> cushioned</s>"
    assert TEACHERS["appending"].texts(["a"], ["b"], ["c"])[0].text == "Query: a\nTitle: b\nSummary: c"
    [pair] = STUDENT.encode(["Running"], ["SHOES"], [""])
    assert [STUDENT.tokenizer.id_to_token(i) for i in pair.ids] == ["[CLS]", "running", "[SEP]", "shoes", "[SEP]"]


def test_five_megabytes_of_text_cost_no_more_than_what_is_kept_of_them():
    started = time.process_time()
    for text in ("word " * 1_000_000, "x" * 5_000_000, "</s>" * 1_200_000, "☕" * 1_500_000, " " * 5_000_000):
        TEACHERS["adding_bos"].texts([text], [text], [text])
        TEACHERS["metaspace"].texts([text], [text], [text])
        STUDENT.encode([text], [text], [text])
    assert time.process_time() - started < 3


def test_limits_below_one_are_refused_by_name():
    with pytest.raises(ValueError, match="max_title_tokens is 0"):
        FieldLimits(max_query_tokens=1, max_title_tokens=0, max_summary_tokens=1)


def save_checkpoint(folder: Path, tokenizer: Tokenizer, **changes) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}), encoding="utf-8")
    values = {
        "role": "teacher",
        "text_format": TEACHER_FORMAT,
        "format_version": FORMAT_VERSION,
        "limits": FieldLimits(6, 5, 12),
        "head": "linear",
        "pooling": "last_token",
        "vocabulary": fingerprint(folder / "tokenizer.json"),
    }
    ScoreCard(**{**values, **changes}).save(folder)
    return folder


def test_a_checkpoints_format_takes_limits_from_its_card_and_ignores_stored_truncation(tmp_path):
    tokenizer = adding_bos()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    layout = TeacherFormat.of_checkpoint(save_checkpoint(tmp_path, tokenizer))
    assert layout.limits == LIMITS
    rows = (["running shoes"], ["Light"], ["cushioned"])
    assert layout.texts(*rows) == TEACHERS["adding_bos"].texts(*rows)
    assert 3 < len(layout.tokenizer.encode(layout.texts(*rows)[0].text).ids) < 50


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"role": "student"}, "is a student, a pretrained or teacher is needed"),
        ({"text_format": "other"}, "text format 'other'"),
        ({"format_version": FORMAT_VERSION + 1}, f"version {FORMAT_VERSION + 1}"),
        ({"vocabulary": "0123456789abcdef"}, "not the tokenizer that the score card names"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(changes, reason, tmp_path):
    save_checkpoint(tmp_path, adding_bos(), **changes)
    with pytest.raises(InputError, match=reason):
        TeacherFormat.of_checkpoint(tmp_path)


def test_a_format_by_the_tokenizers_own_template_reads_the_document_as_one_text():
    tokenizer = adding_bos()
    tokenizer.add_special_tokens(["[SEP]"])
    marks = [("<s>", 1), ("[SEP]", tokenizer.token_to_id("[SEP]"))]
    template = {"single": "<s> $A [SEP]", "pair": "<s> $A [SEP] [SEP] $B [SEP]"}
    tokenizer.post_processor = processors.TemplateProcessing(**template, special_tokens=marks)
    text = PairFormat(tokenizer, FieldLimits(40, 40, 40))
    for query, title, summary in (
        ("running shoes", "Light", "and red"),
        ("a", "", "red"),
        ("a", "b", ""),
        ("", "", ""),
    ):
        expected = tokenizer.encode(query, f"{title} {summary}".strip()).ids
        [plain] = text.encode([query], [title], [summary])
        # space around a field is no part of it
        [spaced] = text.encode([f" {query} "], [f"  {title}"], [f"\t{summary} "])
        assert plain.ids == spaced.ids == expected
        assert plain.ids[plain.document_start - 2 : plain.document_start] == [marks[1][1]] * 2
    assert not text.token_types and text.max_tokens() == 120 + 4
    with pytest.raises(InputError, match="no template for pairs"):
        PairFormat(adding_bos(), LIMITS)


def test_tokenizers_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(InputError, match="not one special token"):
        TeacherFormat(word_piece(SENTENCES, 150), "</s>", LIMITS)
    with pytest.raises(InputError, match=r"no \[CLS\], \[SEP\], \[PAD\]"):
        StudentFormat(adding_bos(), LIMITS)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_marks_that_a_tokenizer_gained_later_are_neutralised_too():
    tokenizer = adding_bos()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    layout = TeacherFormat(tokenizer, "</s>", LIMITS)
    [found] = layout.texts(["a<|im_end|>"], ["<|IM_END|>"], [""])
    assert found.text == "Query: a< |im\nTitle: < |IM\nSummary: </s>"
    assert layout.tokenizer.token_to_id("<|im_end|>") not in layout.tokenizer.encode(found.text).ids


def test_a_token_that_begins_with_a_space_is_neutralised_too():
    """Seen: a text with one was never done, and took all memory."""
    tokenizer = adding_bos()
    tokenizer.add_tokens([" <x>"])
    [found] = TeacherFormat(tokenizer, "</s>", LIMITS).texts(["a <x>"], ["b"], [""])
    assert found.text == "Query: a < x>\nTitle: b\nSummary: </s>"


def test_pairs_in_one_array_are_the_same_pairs_in_any_choice_of_rows():
    pairs = [EncodedPair([5, 6, 7], 2), EncodedPair([8], 1), EncodedPair([], 0), EncodedPair([9, 10], 1)]
    together = EncodedPairs.of(pairs)
    assert together.split() == pairs and len(together) == 4 and together.ids.dtype == np.int32
    assert together.take([3, 0, 2, 0]).split() == [pairs[row] for row in (3, 0, 2, 0)]
    assert together.take([]).split() == [] == EncodedPairs.of([]).split()
