"""A teacher folder without weights, candidate files, and stub teacher servers for the labelling tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ranking.card import ScoreCard, fingerprint
from ranking.limits import FieldLimits
from ranking.schema import TABLES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """What the labeller needs of a teacher checkpoint: a byte-level tokenizer, its end token, and the score card."""
    folder = tmp_path_factory.mktemp("teacher")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    ScoreCard(
        "teacher", "query-title-summary-eos", 1, FieldLimits(32, 32, 64), "linear", "last_token",
        vocabulary=fingerprint(folder / "tokenizer.json"),
    ).save(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def write_candidates(tmp_path_factory):
    """write_candidates(n, per_query=8) -> a candidates.parquet of n rows."""

    def write(n: int, per_query: int = 8, name: str = "candidates.parquet") -> Path:
        path = tmp_path_factory.mktemp("candidates") / name
        rows = range(n)
        columns = {
            "query_id": [f"q{i // per_query}" for i in rows],
            "doc_id": [f"d{i % per_query}" for i in rows],
            "query": [f"query number {i // per_query}" for i in rows],
            "title": [f"title {i}" for i in rows],
            "summary": [f"what document {i} says" for i in rows],
        }
        pq.write_table(pa.table(columns, schema=TABLES["candidates"].schema), path, row_group_size=700)
        return path

    return write


@pytest.fixture(scope="session")
def spoil_text():
    """spoil_text(path, column, row): that cell of a Parquet file is no UTF-8 any more. row: 0-based."""

    def spoil(path: Path, column: str, row: int) -> None:
        table = pq.read_table(path)
        cells = [cell if cell is None else cell.encode() for cell in table.column(column).to_pylist()]
        cells[row] = b"\xff\xfe"
        text = pa.Array.from_buffers(pa.string(), len(cells), pa.array(cells, pa.binary()).buffers())
        pq.write_table(table.set_column(table.column_names.index(column), column, text), path, row_group_size=100)

    return spoil


class StubServer:
    """A stub teacher in a process of its own. start() again after kill() takes the same port."""

    def __init__(self, teacher_folder: Path, *options: str):
        self.options = ["--teacher", str(teacher_folder), *options]
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(ROOT / "tests/helpers/stub_teacher.py"), *self.options, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def start_stub(teacher_folder):
    """start_stub(*options) -> StubServer; all are killed when the session ends."""
    servers: list[StubServer] = []

    def start(*options: str) -> StubServer:
        servers.append(StubServer(teacher_folder, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def stub(start_stub) -> StubServer:
    """A stub that answers at once and never fails."""
    return start_stub()


@pytest.fixture(scope="session")
def label(teacher_folder):
    """label(candidates, out, *flags) -> a started labeller with captured stderr; label.run waits and returns
    (code, stderr)."""

    class Labeller:
        def __call__(self, candidates: Path, out: Path, *flags: str) -> subprocess.Popen:
            command = [sys.executable, str(ROOT / "clients/label_corpus.py"), "--candidates", str(candidates)]
            command += ["--out", str(out), "--teacher", str(teacher_folder), *flags]
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        def run(self, candidates: Path, out: Path, *flags: str) -> tuple[int, str]:
            process = self(candidates, out, *flags)
            try:
                printed, logged = process.communicate(timeout=240)
            finally:
                process.kill()
            return process.returncode, printed + logged

    return Labeller()
