"""A program whose packages are not installed says in one line what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

from disranker.__main__ import main
from disranker.needs import missing_package
from ranking.extras import remedy
from tests.helpers.code_map import ROOT


@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("clients.ab_router", "uvicorn"),  # imported by the program itself
        ("clients.ab_report", "duckdb"),  # imported by a module that it imports
        ("training.distill_student", "torch"),
        ("build.build_student", "tritonclient"),
    ],
)
def test_a_package_that_is_not_there_is_found_before_the_start(program, package):
    assert missing_package(program) is None
    assert missing_package(program, lambda name: name != package) == package


def test_every_program_starts_with_what_is_installed_here():
    from disranker.programs import read_programs

    assert {p.name: m for p in read_programs() if (m := missing_package(p.module))} == {}


def test_the_command_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("disranker.__main__.missing_package", lambda module: "uvicorn")
    assert main(["ab-router"]) == 1
    said = "disranker: error: ab-router needs uvicorn: pip install 'disranker[clients]'"
    assert capsys.readouterr().err.strip() == said


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("uvicorn", "clients"), ("ray", "ray"), ("opentelemetry", "tracing"), ("grpc", "clients"),
        ("presidio_analyzer", "privacy"), ("sklearn", "train"), ("axe_core", ""),
    ],
)  # fmt: skip
def test_the_smallest_extra_that_has_a_package_is_named(module, extra, monkeypatch):
    # as pyproject.toml has them: an installation from before an edit would not know it
    import tomllib

    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needs = [f"{need}; extra == '{name}'" for name, listed in table.items() for need in listed]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    wanted = f"pip install 'disranker[{extra}]'" if extra else "`make install` brings everything"
    assert remedy(module) == wanted


def test_a_package_that_is_imported_only_when_needed_is_named_too():
    source = (
        "import sys; sys.modules['tantivy'] = None\n"
        "from demo.engine_page import main, Config\n"
        "from ranking.program import run\n"
        "run(main, Config, example='', argv=['--data', 'nowhere'])"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: tantivy is not installed here: ")
