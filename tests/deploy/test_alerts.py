"""Prometheus' and Alertmanager's own tools read what deploy/ gives them, and every alert fires when it should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
CASES = Path(__file__).with_name("alert_cases.yaml")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (apt: prometheus)")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_promtool
def test_prometheus_reads_its_configuration_and_the_rules(tmp_path):
    for name in ("prometheus.yaml", "alerts.yaml"):  # side by side, as compose mounts them
        shutil.copy(DEPLOY / name, tmp_path / name)
    assert "1 rule files found" in run("promtool", "check", "config", tmp_path / "prometheus.yaml")
    targets = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["alerting"]["alertmanagers"]
    assert targets == [{"static_configs": [{"targets": ["alertmanager:9093"]}]}]


def test_compose_loads_the_rules_of_what_it_scrapes_and_no_others():
    """Seen: rules on the watch's metrics were loaded where nothing scrapes them, so that none could ever fire."""
    configuration = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    jobs = {job["job_name"] for job in configuration["scrape_configs"]}
    rules = [
        rule["expr"]
        for file in configuration["rule_files"]
        for group in yaml.safe_load((DEPLOY / file).read_text())["groups"]
        for rule in group["rules"]
    ]
    assert not any("disranker_watch" in rule for rule in rules)
    assert {job for rule in rules for job in re.findall(r'job="(\w+)"', rule)} == jobs
    volumes = yaml.safe_load((DEPLOY.parent / "compose.yaml").read_text())["services"]["prometheus"]["volumes"]
    mounted = {volume.split(":")[0] for volume in volumes}
    assert {f"./deploy/{file}" for file in configuration["rule_files"]} <= mounted
    assert "./deploy/watch_alerts.yaml" not in mounted


@needs_promtool
@pytest.mark.parametrize("cases", ["alert_cases.yaml", "watch_alert_cases.yaml"])
def test_every_alert_fires_when_it_should_and_not_before(cases):
    run("promtool", "test", "rules", CASES.with_name(cases))


def test_every_alert_has_a_firing_and_a_quiet_case():
    rules = {rule["alert"] for rule in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0]["rules"]}
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == rules
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == rules


@pytest.mark.parametrize("name", ["alerts.yaml", "watch_alerts.yaml"])
def test_every_alert_goes_to_a_receiver(name):
    """The alertmanager routes by these two words alone."""
    rules = [rule for group in yaml.safe_load((DEPLOY / name).read_text())["groups"] for rule in group["rules"]]
    assert rules and {rule["labels"]["severity"] for rule in rules} <= {"page", "ticket"}


@pytest.mark.skipif(shutil.which("amtool") is None, reason="needs amtool (apt: prometheus-alertmanager)")
def test_the_alertmanager_reads_its_configuration_and_pages_go_to_the_pager():
    configuration = DEPLOY / "alertmanager.yaml"
    assert "2 receivers" in run("amtool", "check-config", configuration)
    for severity, receiver in (("page", "page"), ("ticket", "ticket")):
        routed = run("amtool", "config", "routes", "test", f"--config.file={configuration}", f"severity={severity}")
        assert routed.splitlines()[0] == receiver  # below it amtool may warn of its own settings on this machine
