"""The one command: it lists what the map of the code calls a program, runs it, and completes its flags."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from disranker.__main__ import listing
from disranker.completion import candidates, flags
from disranker.programs import read_programs
from tests.helpers.code_map import ROOT, TOP_FOLDERS, sources

PROGRAMS = {program.name: program for program in read_programs()}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "disranker", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_every_file_that_runs_a_command_line_is_listed_and_nothing_else():
    runs = re.compile(r"^if __name__ == .__main__.:", flags=re.M)
    called = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for folder in TOP_FOLDERS
        for path in sources(ROOT, folder)
        if runs.search(path.read_text())
    }
    modules = {program.module for program in PROGRAMS.values()}
    # started by others: the console scripts, and the backend that watches over vLLM; measurements need no line each
    left_out = {name for name in called - modules if not name.startswith(("benchmarks.", "disranker."))}
    assert left_out <= {"serving.tritonserver", "serving.backends.vllm.watchdog"}
    assert modules <= called
    assert len(PROGRAMS) == len(modules)


def test_the_list_has_a_line_for_each_program_under_its_stage():
    told = listing(list(PROGRAMS.values()))
    assert re.search(r"^training/: clicks and judgments in", told, flags=re.M)
    assert re.search(r"^  distill-student +stage 3: a BERT trained to imitate", told, flags=re.M)
    assert re.search(r"^  demo-run +the stages in order$", told, flags=re.M)
    assert told.index("prepare-data") < told.index("build-student") < told.index("ab-router")


def test_a_named_program_runs_with_its_own_flags_and_exit_code():
    helped = command("rerank", "--help")
    assert helped.returncode == 0 and "--deadline-ms" in helped.stdout
    refused = command("ab_compact", "--log", "/nowhere/at/all")
    assert refused.returncode == 2 and "ab_compact" in refused.stderr and "Traceback" not in refused.stderr
    unknown = command("distil-student")
    assert (unknown.returncode, unknown.stderr) == (
        2, "disranker: error: no program is called 'distil-student'; did you mean distill-student?\n"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["rerank", "ab-router", "label-corpus"])
def test_the_flags_read_from_the_source_are_those_of_the_programs_help(name):
    told = command(name, "--help").stdout
    helped = set(re.findall(r"^  (?:-h, )?(--[a-z][a-z0-9.-]*)", told, flags=re.M)) - {"--print-config"}
    assert set(flags(PROGRAMS[name].module)) == helped


def test_a_package_of_the_users_own_is_not_taken_for_ours(tmp_path):
    """Seen: `No module named training.prepare_data` in every project that has a package `training` of its own."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "disranker", "prepare-data", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--source" in done.stdout, done.stderr


def test_completion_knows_programs_flags_and_shells():
    assert candidates(PROGRAMS, ["ab-r"]) == ["ab-router", "ab-report"]
    assert "--limits.max-query-tokens" in candidates(PROGRAMS, ["distill-student", "--limits"])
    assert candidates(PROGRAMS, ["distill-student", "--data", "fol"]) == []  # the shell's own file names
    assert candidates(PROGRAMS, ["--completion", "z"]) == ["zsh"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_ones_that_the_shell_reads(shell, tmp_path):
    written = command("--completion", shell)
    assert written.returncode == 0 and "disranker --complete" in written.stdout
    if shell == "bash":
        (tmp_path / "disranker").write_text(f'#!/bin/sh\nexec {sys.executable} -m disranker "$@"\n')
        (tmp_path / "disranker").chmod(0o755)
        asked = 'COMP_WORDS=(disranker rerank --dead); COMP_CWORD=2; _disranker; echo "${COMPREPLY[@]}"'
        path = f"{tmp_path}:/usr/bin:/bin"
        done = subprocess.run(
            ["bash", "-c", f"{written.stdout}\n{asked}"], cwd=ROOT, env={"PATH": path}, capture_output=True, text=True
        )
        assert done.stdout == "--deadline-ms\n", done.stderr


def test_a_package_without_the_docs_folder_has_its_own_copy_of_the_page():
    settings = (ROOT / "pyproject.toml").read_text()
    assert '"docs/architecture.md" = "disranker/architecture.md"' in settings
    assert Path(ROOT / "docs/architecture.md").is_file()
