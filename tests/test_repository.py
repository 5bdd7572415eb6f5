"""What no tracked file may hold: a package registry's host, or a path of the machine; and no test is passed over."""

from __future__ import annotations

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# written in two halves, so that this file passes its own test
REGISTRIES = [
    "py" + "pi.org", "python" + "hosted.org", "test.py" + "pi", "py" + "pi.nvidia.com", "download.py" + "torch.org",
    "npm" + "js.org", "npm" + "js.com", "crates" + ".io", "conda" + ".anaconda.org", "yarn" + "pkg.com",
    "proxy.golang" + ".org", "rubygems" + ".org", "index" + "-url =", "--index" + "-url", "--extra-index" + "-url",
]  # fmt: skip
# a container's own mount point under /work is no machine path, a checkout there is; KServe mounts at /mnt/models
MACHINE_PATH = re.compile(
    r"(?<![\w.~}/-])/(?:work/(?:main|shared|\.)|"
    r"(?:" + "|".join(("root", "home", "Users", "mnt(?!/models)")) + r")/[\w.-]+)"
)
TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|ghp_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}|sk-[A-Za-z0-9]{40,})\b")


def tracked_texts() -> list[tuple[str, str]]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    found = []
    for name in listed.decode("utf-8").split("\0"):
        path = ROOT / name
        if name and path.is_file():
            content = path.read_bytes()
            if b"\0" not in content[:8192]:
                found.append((name, content.decode("utf-8")))
    return found


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:160]}"
        for name, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_tracked_file_names_a_package_registry():
    assert lines_with(re.compile("|".join(map(re.escape, REGISTRIES)))) == []


def test_no_tracked_file_holds_a_path_of_the_machine_it_was_written_on():
    assert lines_with(MACHINE_PATH) == []


def test_no_tracked_file_holds_a_credential():
    assert lines_with(TOKEN) == []


def test_the_patterns_find_what_they_are_for():
    assert MACHINE_PATH.search("see /" + "work/main/x") and MACHINE_PATH.search('"/' + 'root/.cache"')
    assert not MACHINE_PATH.search("../home/x") and not MACHINE_PATH.search("https://example.org/home/x")
    assert not MACHINE_PATH.search("/models/teacher") and not MACHINE_PATH.search("{base}/home/x")


def test_no_data_set_or_built_artefact_is_tracked():
    names = [name for name, _ in tracked_texts()]
    endings = (".parquet", ".safetensors", ".onnx", ".plan", ".bin", ".pt", ".jsonl.gz", ".tsv.gz")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [name for name in listed.splitlines() if name.endswith(endings)] == []
    assert [name for name in names if (ROOT / name).stat().st_size > 1_000_000] == []


def test_no_folder_of_tests_is_left_out_by_its_name(pytestconfig):
    """pytest's own list of folders to pass over has "build", which once hid tests/build from every run."""
    left_out = pytestconfig.getini("norecursedirs")
    folders = {part for file in (ROOT / "tests").rglob("test_*.py") for part in file.relative_to(ROOT).parts[:-1]}
    assert "build" in folders
    assert [folder for folder in sorted(folders) if any(fnmatch(folder, pattern) for pattern in left_out)] == []
