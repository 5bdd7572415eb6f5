"""The command line that all programs share: flags, YAML, exits, and one line for whatever is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from ranking.errors import DataError, InputError, Refused
from ranking.program import REPEATED_ONLY, parse, run

ROOT = Path(__file__).parents[2]


@dataclass
class Sizes:
    """Sizes.

    Args:
        layer_count: layers
        small: a small one
    """

    layer_count: int = 2
    small: bool = False

    def __post_init__(self):
        if self.layer_count < 1:
            raise ValueError(f"layer_count is {self.layer_count}: at least 1 is needed")


@dataclass
class Config:
    """Do one thing.

    Args:
        data: the folder
        batch_size: rows of a batch
        dry_run: only say what would be done
        url: servers
        rate: a share
        mode: how
        note: free text
        sizes: nested sizes
        user: ids of others
    """

    data: Path
    batch_size: int = 8
    dry_run: bool = False
    url: list[str] = field(default_factory=list)
    rate: float | None = None
    mode: Literal["fast", "safe"] = "safe"
    note: str = ""
    sizes: Sizes = field(default_factory=Sizes)
    user: list[str] = field(default_factory=list, metadata=REPEATED_ONLY)

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: at least 1 is needed")


@dataclass
class Limit:
    """Limits.

    Args:
        max_tokens: tokens that are read
    """

    max_tokens: int


@dataclass
class Cut:
    """Cut something.

    Args:
        data_folder: the folder
        limits: nested limits
    """

    data_folder: Path
    limits: Limit = field(default_factory=lambda: Limit(4))


def flags(*words: str) -> Config:
    return parse(Config, list(words), prog="thing")


def test_flags_have_dashes_and_the_dataclass_gets_its_types():
    found = flags("--data", "x/y", "--batch-size=4", "--rate", "0.5", "--mode", "fast", "--sizes.layer-count", "6")
    assert found == Config(Path("x/y"), 4, rate=0.5, mode="fast", sizes=Sizes(6))
    assert flags("--data", "x", "--batch_size", "4").batch_size == 4  # underscores are forgiven
    assert flags("--data", "x").sizes == Sizes()


@pytest.mark.parametrize(
    "words, value",
    [
        (["--dry-run"], True), (["--no-dry-run"], False),
        (["--dry-run", "true"], True), (["--dry-run=false"], False), ([], False),
    ],
)  # fmt: skip
def test_a_bool_needs_no_value(words, value):
    assert flags("--data", "x", *words).dry_run is value
    assert flags(*words, "--data", "x").dry_run is value


@pytest.mark.parametrize(
    "words",
    [["--url", "a", "--url", "b"], ["--url", "a,b"], ["--url=a,b"], ["--url", "a", "b"], ["--url", '["a", "b"]']],
)
def test_a_list_is_repeated_or_given_with_commas(words):
    assert flags(*words, "--data", "x").url == ["a", "b"]


@pytest.mark.parametrize(
    "words",
    [
        ["--url", "a", "--url+", "b", "--url+", "c"], ["--url+", "b,c", "--url", "a"], ["--url+=b,c", "--url=a"],
        ["--url", "a", "--url+", "b", "c"], ["--url", "a", "--url+", '["b", "c"]'],
        ["--url", "a", "--url+", "b", "--url+", '["c"]'],
    ],
)  # fmt: skip
def test_what_is_added_to_a_list_joins_what_the_list_has(words):
    """Seen: what was added to a list that the command line gave was dropped without a word."""
    assert flags("--data", "x", *words).url == ["a", "b", "c"]


def test_what_is_added_to_a_list_joins_that_of_the_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: d\nurl: [u]\n", encoding="utf-8")
    assert flags("--url+", "v", "--config", str(file)).url == ["u", "v"]


def test_a_list_of_ids_is_repeated_and_takes_them_as_they_are():
    """Seen: the user "smith,john" was two others, and a list in JSON was no id either."""
    assert flags("--data", "x", "--user", "smith,john", "--user=[1, 2]", "--user", "").user == [
        "smith,john",
        "[1, 2]",
        "",
    ]


def test_a_value_may_look_like_another_thing():
    assert flags("--data", "x", "--note", "true").note == "true"
    assert flags("--data", "x", "--note", "5").note == "5"
    assert flags("--data", "x", "--note=a=b --c").note == "a=b --c"
    assert flags("--data", "x", "--url", "[not json").url == ["[not json"]
    assert flags("--data", "x", "--rate", "-1").rate == -1


def test_flags_win_over_the_yaml_wherever_they_stand(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: d\nbatch_size: 3\nurl: [u]\nsizes:\n  layer_count: 9\n  small: true\n", encoding="utf-8")
    assert flags("--config", str(file)) == Config(Path("d"), 3, url=["u"], sizes=Sizes(9, True))
    for words in (["--batch-size", "5", "--config", str(file)], [f"--config={file}", "--batch-size", "5"]):
        assert flags(*words).batch_size == 5
    assert flags("--config", str(file), "--url", "v").url == ["v"]
    assert flags("--config", str(file), "--sizes.layer-count", "1").sizes == Sizes(1, True)


@pytest.mark.parametrize(
    "words, reason",
    [
        ([], "data"),
        (["--data", "x", "--bacth-size", "3"], "--bacth-size"),
        (["--data", "x", "--batch-size", "three"], "batch_size"),
        (["--data", "x", "--batch-size"], "expected one argument"),
        (["--data", "x", "--url"], "expected one argument"),
        (["--data", "x", "--mode", "slow"], "mode"),
        (["--data", "x", "--batch-size", "0"], "batch_size is 0: at least 1 is needed"),
        (["--data", "x", "--sizes.layer-count", "0"], "layer_count is 0: at least 1 is needed"),
        (["--data", "x", "--sizes.width", "3"], "--sizes.width"),
        (["--data", "x", "stray"], "stray"),
        (["--config", "no/such/file.yaml"], "no/such/file.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_two(words, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags(*words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("thing: error: ") and reason in error and "--help" in error


@pytest.mark.parametrize(
    "content, reason",
    [("data: [x\n", "parsing"), ("data: d\nbatchsize: 3\n", "batchsize"), ("data: d\nsizes:\n  width: 3\n", "width")],
)
def test_a_wrong_yaml_is_one_line_and_exit_two(content, reason, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        flags("--config", str(file))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and reason in error


def test_bare_words_fill_the_named_positionals():
    assert parse(Config, ["d", "--batch-size", "2"], prog="thing", positional=("data",)).data == Path("d")


def test_help_shows_dashes_descriptions_and_the_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, ["--help"], prog="thing", example="thing --data x")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--batch-size" in text and "--batch_size" not in text
    assert "rows of a batch" in text and "example: thing --data x" in text


def test_help_and_errors_name_types_and_what_is_required_as_a_person_would(capsys):
    """Seen: limits with a default were called required, and paths `<class 'Path'>`."""
    with pytest.raises(SystemExit):
        parse(Cut, ["--help"], prog="thing")
    text = " ".join(capsys.readouterr().out.split())
    assert "(required, type: Path)" in text and "(type: int, default: 4)" in text and "[--limits.max-tokens" in text
    with pytest.raises(SystemExit):
        parse(Cut, [], prog="thing")
    assert capsys.readouterr().err == "thing: error: the following arguments are required: --data-folder (see --help)\n"


@pytest.mark.parametrize(
    "raised, code, line",
    [
        (InputError("no such folder"), 1, "error: no such folder\n"),
        (Refused("worse than what serves"), 3, "error: worse than what serves\n"),
        (DataError("f.tsv", "grade is NaN", 3), 1, "error: f.tsv, row 3: grade is NaN\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (PermissionError(13, "Permission denied", "/out"), 1, "error: /out: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
    ],
)
def test_what_goes_wrong_becomes_an_exit_code_and_one_line(raised, code, line, capsys):
    def main(config: Config) -> None:
        raise raised

    with pytest.raises(SystemExit) as stopped:
        run(main, Config, example="", argv=["--data", "x"])
    assert stopped.value.code == code
    assert capsys.readouterr().err == line


def test_a_defect_keeps_its_stack_trace():
    def main(config: Config) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main, Config, example="", argv=["--data", "x"])


def test_the_exit_code_of_main_is_the_programs():
    for returned, code in ((None, 0), (0, 0), (3, 3)):
        with pytest.raises(SystemExit) as stopped:
            run(lambda config, returned=returned: returned, Config, example="", argv=["--data", "x"])
        assert stopped.value.code == code


@pytest.mark.parametrize("program", [["-m", "training.prepare_data"], ["-m", "training.evaluate"]], ids=str)
def test_a_program_shows_its_help_and_refuses_an_unknown_flag(program):
    environment = {**os.environ, "COLUMNS": "200"}
    helped = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert helped.returncode == 0 and "example: " in helped.stdout and program[-1] in helped.stdout
    refused = subprocess.run([sys.executable, *program, "--no-such-flag"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
