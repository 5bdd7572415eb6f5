"""The vocabulary of a student from scratch: one set of texts gives one vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from ranking.schema import TABLES, write_table
from ranking.text import load_tokenizer
from training.student.vocabulary import MAX_CHARACTERS, SPECIAL_TOKENS, train_wordpiece

WORDS = "tent red camping stove tents reddish campers stoves outdoor lantern lanterns brightness bright café"
RARE = "".join(map(chr, range(0x4E00, 0x4E00 + MAX_CHARACTERS + 200)))  # more characters than are taken, each once


def dataset(folder: Path, texts: list[str]) -> Path:
    rows = [
        {"query_id": "q", "doc_id": str(number), "query": "tent", "title": text, "summary": ""}
        for number, text in enumerate(texts)
    ]
    folder.mkdir()
    write_table(folder / "candidates.parquet", "candidates", pa.Table.from_pylist(rows, TABLES["candidates"].schema))
    return folder


@pytest.mark.parametrize("texts", [WORDS.split(), [WORDS, RARE]], ids=["words", "more characters than are taken"])
def test_the_same_texts_give_the_same_vocabulary(tmp_path, texts):
    data = dataset(tmp_path / "data", texts)
    first, again = (train_wordpiece(data, tmp_path / str(run), 4_000) / "tokenizer.json" for run in range(2))
    assert first.read_text() == again.read_text()


def test_special_tokens_come_first_and_letters_inside_words_are_ordinary(tmp_path):
    data = dataset(tmp_path / "data", WORDS.split())
    written = json.loads((train_wordpiece(data, tmp_path / "out", 60) / "tokenizer.json").read_text())
    assert [token["content"] for token in written["added_tokens"]] == list(SPECIAL_TOKENS)
    vocabulary = written["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary))) and len(vocabulary) == 60
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("Café tents", add_special_tokens=False).ids) == "cafe tents"


def test_the_rarest_characters_are_left_out(tmp_path):
    data = dataset(tmp_path / "data", [WORDS, RARE])
    vocabulary = load_tokenizer(train_wordpiece(data, tmp_path / "out", 4_000)).get_vocab()
    assert sum(len(token) == 1 for token in vocabulary) == MAX_CHARACTERS
    assert set("tenrdcamp") <= set(vocabulary)
