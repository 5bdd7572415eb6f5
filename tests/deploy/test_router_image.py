"""The recipe of the router's image, followed without Docker: as an account that may write nowhere but to the log."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml

from tests.helpers.installed_packages import hide_all_but, with_all_needs

ROOT = Path(__file__).parents[2]
RECIPE = (ROOT / "deploy" / "router.Dockerfile").read_text()
SERVICE = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["router"]
NOBODY = 65534


@dataclass
class Account:
    """Who runs the recipe: an account without any right, and a Python that it may start."""

    python: str
    folder: Path
    identity: dict[str, int]  # arguments of subprocess
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, cwd: Path) -> str:
        done = subprocess.run(command, cwd=cwd, env=self.variables, capture_output=True, text=True, **self.identity)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def account() -> Iterator[Account]:
    """Root becomes `nobody`; everybody else is unprivileged already. The folder is new and belongs to that account."""
    packages = sysconfig.get_path("purelib")
    identity = {"user": NOBODY, "group": NOBODY} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are closed to other accounts
        folder = Path(name)
        folder.chmod(0o755)
        variables = {"PYTHONPATH": packages, "HOME": name, "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
        for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
            try:  # root's own Python may lie where nobody else can read
                probe = [python, "-c", "import pydantic_core, grpc, hatchling"]
                subprocess.run(probe, env=variables, check=True, capture_output=True, cwd="/", **identity)
            except (OSError, subprocess.CalledProcessError):
                continue
            yield Account(python, folder, identity, variables)
            return
    pytest.skip("no Python with these packages that an account without rights may start")


def test_the_image_starts_as_nobody_and_serves_on_a_log_folder_that_it_may_write(account):
    app, log, salt = account.folder / "app", account.folder / "log", account.folder / "salt"
    copied = [line.split()[1:] for line in RECIPE.splitlines() if line.startswith("COPY")]
    for *sources, target in copied:
        for source in sources:
            place = app / target / source if target == "./" else app / target
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / source, place)
    (installation,) = re.findall(r"^RUN pip install --no-cache-dir -c constraints.txt \"(.+)\"$", RECIPE, re.M)
    build, site = account.folder / "build", account.folder / "site"
    shutil.copytree(app, build)  # hatchling writes nothing, but pip wants to
    for path in (build, *build.rglob("*")):
        os.chown(path, account.identity.get("user", -1), -1)
    site.mkdir()
    os.chown(site, account.identity.get("user", -1), -1)
    account.run(
        account.python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-compile",
        "--target", str(site), installation, cwd=build,
    )  # fmt: skip
    assert (site / "clients" / "ab" / "judging" / "search_page.html").is_file()
    assert (site / "clients" / "ab" / "judging" / "shared_page.js").is_file()

    # only what the recipe's line brings can be imported
    extras = re.fullmatch(r"\.\[([\w,]+)\]", installation)[1].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = (need for extra in extras for need in project["optional-dependencies"][extra])
    needs = with_all_needs([*project["dependencies"], *wanted])
    assert "torch" not in needs
    hide_all_but(needs, site)
    account.variables["PYTHONPATH"] = f"{site}:{account.variables['PYTHONPATH']}"

    log.mkdir(mode=0o750)
    salt.write_text("0123456789abcdef" * 4)
    salt.chmod(0o400)
    for path in (log, salt):
        os.chown(path, account.identity.get("user", -1), account.identity.get("group", -1))
    (user,) = re.findall(r"^USER (\d+):\d+$", RECIPE, re.M)
    assert int(user) == NOBODY
    entry = json.loads(re.findall(r"^ENTRYPOINT (.+)$", RECIPE, re.M)[0])
    assert entry[0] == "python"
    places = {
        "/experiments/${EXPERIMENT:-example.yaml}": str(app / "clients/experiments/example.yaml"),
        "/log": str(log), "/run/secrets/ab_salt": str(salt), "balancer:8001": "127.0.0.1:9", "0.0.0.0": "127.0.0.1",
    }  # fmt: skip
    flags = [f"{name}={places[value]}" for name, value in (flag.split("=", 1) for flag in SERVICE["command"])]
    with (account.folder / "output").open("wb") as output:
        router = subprocess.Popen(
            [account.python, *entry[1:], *flags, "--port=0", "--drain-seconds=0.5", "--log-wait-ms=60000"],
            cwd=app, env=account.variables, stderr=output, **account.identity,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"listening on (\S+)", (account.folder / "output").read_text())):
            assert router.poll() is None and time.monotonic() < deadline, (account.folder / "output").read_text()
            time.sleep(0.05)
        assert httpx.get(f"{found[1]}/health/ready", timeout=30).status_code == 200
        (probed,) = re.findall(r"http://127.0.0.1:8080(/[\w/]+)", SERVICE["healthcheck"]["test"][-1])
        assert httpx.get(f"{found[1]}{probed}", timeout=30).status_code == 200
        page = {"user_id": "u", "query": "q", "documents": [{"doc_id": "a", "title": "t"}]}
        assert httpx.post(f"{found[1]}/rank", json=page, timeout=30).json()["logged"] is True
        (written,) = (path.stat() for path in log.iterdir() if path.stat().st_size)
        assert written.st_uid == account.identity.get("user", os.getuid()) and not written.st_mode & 0o007
        router.send_signal(signal.SIGTERM)
        grace = float(SERVICE["stop_grace_period"].rstrip("s"))
        assert router.wait(grace) in (0, -signal.SIGTERM)  # the signal, when all is written
    finally:
        router.kill()
        router.wait()
