"""The WordPiece vocabulary of students from scratch."""

from __future__ import annotations

import random
import subprocess
import sys

import pyarrow as pa
from transformers import AutoTokenizer

from ranking.schema import write_table
from training.student.vocabulary import train_wordpiece


def test_the_same_texts_give_the_same_vocabulary_in_every_process(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyzéüß用户горы", k=rng.randint(1, 9))) for _ in range(300)]
    rows = [
        {
            "query_id": f"q{n}", "doc_id": "d", "query": f"{words[n]} ##a [SEP]", "title": " ".join(words[n : n + 4]),
            "summary": "",
        }
        for n in range(290)
    ]  # fmt: skip
    write_table(tmp_path / "candidates.parquet", "candidates", pa.Table.from_pylist(rows))
    script = "import sys; from training.student.vocabulary import train_wordpiece; train_wordpiece(*sys.argv[1:3], 400)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(tmp_path / "there")], check=True)
    here = train_wordpiece(tmp_path, tmp_path / "here", 400)
    assert (here / "tokenizer.json").read_bytes() == (tmp_path / "there" / "tokenizer.json").read_bytes()


def test_letters_that_were_numbered_first_are_no_special_tokens(tmp_path):
    rows = [{"query_id": "q", "doc_id": "d", "query": "a moon", "title": "moons", "summary": "##a"}]
    write_table(tmp_path / "candidates.parquet", "candidates", pa.Table.from_pylist(rows))
    folder = train_wordpiece(tmp_path, tmp_path / "out", 60)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("moon ##a") == ["moon", "#", "#", "a"]
    assert sorted(tokenizer.all_special_tokens) == sorted(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
