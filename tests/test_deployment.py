"""compose.yaml and what it mounts: valid, complete, and the same alerts in the rules and in the runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from clients.ab.router.metrics import Metrics

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


SCHEMA = Path("/usr/lib/python3/dist-packages/compose/config/compose_spec.json")  # of Debian's docker-compose


def test_compose_follows_the_compose_specification():
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        subprocess.run(["docker", "compose", "--file", str(ROOT / "compose.yaml"), "config", "--quiet"], check=True)
    elif SCHEMA.is_file():
        jsonschema.Draft7Validator(json.loads(SCHEMA.read_text())).validate(COMPOSE)
    else:
        pytest.skip("needs docker compose, or the specification that Debian's docker-compose carries")


def test_every_file_that_a_service_mounts_or_builds_from_is_there():
    for name, service in COMPOSE["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            made_at_run_time = source.startswith(("./model_repository", "./runs"))
            assert made_at_run_time or (ROOT / source).exists(), f"{name}: {source}"
        if "build" in service:
            dockerfile = ROOT / service["build"]["dockerfile"]
            for line in dockerfile.read_text().splitlines():
                if line.startswith("COPY"):
                    *sources, _ = line.split()[1:]
                    assert all((ROOT / s).exists() for s in sources), line


def test_ports_are_published_on_loopback_alone():
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published and all(port.startswith("127.0.0.1:") for port in published)


def test_the_runbook_explains_every_alert_and_no_other():
    rules = yaml.safe_load((ROOT / "deploy/alerts.yaml").read_text())["groups"][0]["rules"]
    runbook = (ROOT / "docs/operations.md").read_text()
    explained = re.findall(r"^\| ([A-Z]\w+) \|", runbook, flags=re.M)
    assert [rule["alert"] for rule in rules] == explained


def test_dashboard_and_alerts_use_metrics_that_exist():
    own = {f"{m.name}_total" if m.type == "counter" else m.name for m in Metrics().registry.collect()}
    texts = (ROOT / "deploy/alerts.yaml").read_text() + (ROOT / "deploy/grafana/disranker.json").read_text()
    used = {re.sub(r"_bucket$", "", name) for name in re.findall(r"\bab_[a-z_]+", texts)}
    assert used <= own, used - own
