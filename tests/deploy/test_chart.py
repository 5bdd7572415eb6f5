"""deploy/helm/disranker, rendered by Helm's own library: valid for Kubernetes, locked, and the same as compose."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from benchmarks.ab.toy_rankers import write_toy_repository
from build.running_server import RunningServer
from build.triton_config import ServingLimits, as_text, front_config
from clients.ab.experiment.file import ExperimentFile
from clients.ab_router import Config as RouterConfig
from clients.label_corpus import Config as LabelConfig
from ranking.cascade import Cascade
from ranking.prior import PriorBlend
from serving.temporary_server import start_triton

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "disranker"
EXAMPLES = ("one-gpu", "fleet", "cpu-only")
NATIVE = ("v1", "apps/v1", "batch/v1", "policy/v1", "networking.k8s.io/v1")
Manifest = dict[str, Any]


def render(values: Manifest) -> list[Manifest]:
    """What `helm template search deploy/helm/disranker --namespace ranking` gives, as objects."""
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="search", namespace="ranking")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


def example(name: str) -> Manifest:
    return yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text())


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Manifest]]:
    return {name: render(example(name)) for name in EXAMPLES}


def of_kind(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] in kinds}


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Name of the workload -> its pod template."""
    workloads = of_kind(manifests, "Deployment", "StatefulSet", "Job")
    return {name: workload["spec"]["template"] for name, workload in workloads.items()}


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def test_helm_finds_no_error_in_the_chart():
    assert helm.lint(str(CHART))["errors"] == []


@pytest.mark.parametrize("release", ["1.27", "1.37"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_object_is_one_that_kubernetes_takes(rendered, name, release):
    native = [manifest for manifest in rendered[name] if manifest["apiVersion"] in NATIVE]
    assert {m["kind"] for m in native} >= {"Deployment", "StatefulSet", "Service", "ConfigMap", "NetworkPolicy"}
    for manifest in native:
        kubernetes_validate.validate(manifest, release, strict=True)
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in rendered[name]]
    assert len(set(names)) == len(names)


def test_the_schemas_refuse_an_unknown_field(rendered):
    service = dict(of_kind(rendered["one-gpu"], "Service")["search-router"])
    service["spec"] = service["spec"] | {"port": 8080}
    with pytest.raises(kubernetes_validate.ValidationError, match="port"):
        kubernetes_validate.validate(service, "1.37", strict=True)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_pod_meets_the_restricted_pod_security_standard(rendered, name):
    """The controls of Kubernetes' Pod Security Standards, level restricted."""
    for workload, pod in pods(rendered[name]).items():
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), workload
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}, volume
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }, f"{workload}: {container['name']}"
            assert "memory" in container["resources"]["limits"] and container["resources"]["requests"]["cpu"]
            assert all("hostPort" not in port for port in container.get("ports", []))


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_an_object_points_to_is_there(rendered, name):
    """Selectors find pods, mounts find volumes, ports have names, targets exist."""
    manifests = rendered[name]
    labels = [pod["metadata"]["labels"] for pod in pods(manifests).values()]
    ports = {port["name"] for pod in pods(manifests).values() for c in containers(pod) for port in c.get("ports", [])}
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selectors = {"Service": ["selector"], "NetworkPolicy": ["podSelector"]}.get(manifest["kind"], ["selector"])
        for key in selectors:
            wanted = spec.get(key) or {}
            wanted = wanted.get("matchLabels", wanted)
            if wanted:
                assert any(wanted.items() <= found.items() for found in labels), manifest["metadata"]["name"]
        if manifest["kind"] == "Service":
            assert {port["targetPort"] for port in spec["ports"]} <= ports
    configured = set(of_kind(manifests, "ConfigMap"))
    for workload, pod in pods(manifests).items():
        claims = of_kind(manifests, "StatefulSet").get(workload, {}).get("spec", {}).get("volumeClaimTemplates", [])
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]} | {c["metadata"]["name"] for c in claims}
        mounted = [mount["name"] for container in containers(pod) for mount in container["volumeMounts"]]
        assert set(mounted) == volumes, workload
        assert {v["configMap"]["name"] for v in pod["spec"]["volumes"] if "configMap" in v} <= configured
    for scaled in of_kind(manifests, "ScaledObject").values():
        assert scaled["spec"]["scaleTargetRef"]["name"] in of_kind(manifests, "Deployment")
        assert "replicas" not in of_kind(manifests, "Deployment")[scaled["spec"]["scaleTargetRef"]["name"]]["spec"]


@contextmanager
def cluster(replicas: int) -> Iterator[helm.Config]:
    """An API server that knows one Deployment, the students of release `search`, with so many replicas now."""
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "search-students"}}
    kind = {"name": "deployments", "singularName": "", "namespaced": True, "kind": "Deployment", "verbs": ["get"]}
    group = {"name": "apps", "versions": [{"groupVersion": "apps/v1", "version": "v1"}]}
    answers = {
        "/version": {"major": "1", "minor": "37", "gitVersion": "v1.37.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]},
        "/apis/apps/v1": {"kind": "APIResourceList", "groupVersion": "apps/v1", "resources": [kind]},
        "/apis/apps/v1/namespaces/ranking/deployments/search-students":
            deployment | {"spec": {"replicas": replicas}},
    }  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path.partition("?")[0], {"kind": "Status", "code": 404, "reason": "NotFound"})
            body = json.dumps(answer).encode()
            self.send_response(answer.get("code", 200))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with helm.Config(kubeconfig_content="{}", kube_apiserver=address, namespace="ranking") as config:
            yield config
        server.shutdown()


@pytest.mark.parametrize(("live", "replicas"), [(9, 9), (1, 4), (0, 4)])
def test_with_autoscaling_an_upgrade_keeps_the_number_of_replicas(live, replicas):
    """Seen: without the field Kubernetes takes 1, so that turning autoscaling on ended all replicas but one."""
    with cluster(live) as config, helm.Chart.load(str(CHART)) as chart:
        files = config.render(chart, example("fleet"), name="search", namespace="ranking", is_upgrade=True)
    (students,) = (text for name, text in files.items() if name.endswith("templates/students.yaml"))
    found = of_kind([each for each in yaml.safe_load_all(students) if each], "Deployment")
    assert found["search-students"]["spec"]["replicas"] == replicas
    assert found["search-students-canary"]["spec"]["replicas"] == 1


def test_no_replicas_are_none_and_not_kubernetes_one():
    arms = [{"name": "student", "version": 1}]
    values = {"students": {"replicas": 0, "arms": arms, "canary": {"enabled": True, "replicas": 0, "arms": arms}}}
    deployments = of_kind(render(values), "Deployment")
    assert [deployments[name]["spec"]["replicas"] for name in ("search-students", "search-students-canary")] == [0, 0]


def component(peer: Manifest) -> str:
    """A peer of a policy in one word: a component of this release, a label, or a namespace."""
    labels = {k: v for kind in peer.values() for k, v in kind["matchLabels"].items()}
    return labels.get("app.kubernetes.io/component") or ",".join(labels.values())


def test_nobody_reaches_more_than_docs_security_says(rendered):
    reached, goes = set(), {}
    for policy in of_kind(rendered["fleet"], "NetworkPolicy").values():
        own = policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        for rule in policy["spec"]["ingress"]:
            assert rule["from"], own  # without peers a rule lets everybody in
            reached |= {(component(peer), own, port["port"]) for peer in rule["from"] for port in rule["ports"]}
        goes[own] = {
            (component(peer), p["port"])
            for rule in policy["spec"]["egress"]
            for peer in rule["to"]
            for p in rule["ports"]
        }
    scraped = {("monitoring", own, port) for own, port in
               (("students", 8002), ("teacher", 8002), ("router", 8080), ("labelling", 9400))}  # fmt: skip
    assert reached - scraped == {
        ("router", "balancer", 8000), ("router", "balancer", 8001),
        ("balancer", "students", 8000), ("balancer", "students", 8001),
        ("true", "students", 8001), ("true", "router", 8080),  # pods labelled as operator, as client of the router
        ("labelling", "teacher", 8001),
    } and scraped <= reached  # fmt: skip
    dns = {("kube-system", 53)}
    assert goes == {
        "students": set(), "teacher": set(),  # what runs a model has no way out
        "balancer": dns | {("students", 8000), ("students", 8001)},
        "router": dns | {("balancer", 8001)}, "labelling": dns | {("teacher", 8001)},
    }  # fmt: skip


def test_a_policy_without_peers_lets_nobody_in():
    values = {"router": {"allowedFrom": []}, "networkPolicies": {"prometheusFrom": []}}
    router = of_kind(render(values), "NetworkPolicy")["search-router"]
    assert router["spec"]["ingress"] == []


def flags(command: str) -> set[str]:
    """Triton's flags in a shell command, without the place of the repository."""
    return {word for word in command.replace("$$", "$").split() if word.startswith("--") and "repository=" not in word}


def test_triton_starts_with_the_flags_of_compose(rendered):
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for workload, service in (("search-students", "students-1"), ("search-teacher", "teacher")):
        command = pods(rendered["fleet"])[workload]["spec"]["containers"][0]["command"][2]
        given, expected = flags(command), flags(services[service]["command"][2])
        assert given == expected and len(given) >= 4
        assert '[ -n "$KEY" ]' in command  # an empty key must end the container
    assert pods(rendered["fleet"])["search-teacher"]["spec"]["containers"][0]["image"] == re.sub(
        r"\$\{\w+:-(.*)\}", r"\1", services["teacher"]["image"]
    )


def started(command: str, folder: Path) -> list[str]:
    """The models that Triton is told to load by the shell command of a container with this model repository."""
    program, key = folder / "bin" / "tritonserver", folder / "key"
    program.parent.mkdir(exist_ok=True)
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    key.write_text("secret")
    for there, here in {
        "$$": "$",
        "/run/secrets/triton_admin_key": f"{key}",
        "/run/secrets/triton/key": f"{key}",
    }.items():
        command = command.replace(there, here)
    command = re.sub(r"/(mnt/)?models\b", str(folder / "models"), command)
    variables = {"ARMS": "student", "PATH": f"{program.parent}:/usr/bin:/bin"}
    done = subprocess.run(["sh", "-c", command], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [word.removeprefix("--load-model=") for word in done.stdout.split() if word.startswith("--load-model=")]


def test_a_cascade_s_small_network_is_loaded_where_the_version_that_serves_calls_it_and_nowhere_else(
    rendered, tmp_path
):
    """Seen: the folder alone counted, so that no server started again after a cascade was published to wait."""
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["students-1"]["command"][2]
    runtime = next(yaml.safe_load_all((ROOT / "deploy" / "kserve.yaml").read_text()))
    chart = pods(rendered["one-gpu"])["search-students"]["spec"]["containers"][0]["command"][2]
    for name in ("student", "student_first_encoder"):
        (tmp_path / "models" / name / "2").mkdir(parents=True)
    cascade = front_config(
        "student", "openvino", ServingLimits(), [16], {}, PriorBlend(), cascade=Cascade(4, 0.0, 1.0, 0.0, 1.0)
    )
    single = front_config("student", "openvino", ServingLimits(), [16], {}, PriorBlend())
    both = ["student", "student_encoder"]
    for config, loaded in ((single, both), (cascade, [*both, "student_first_encoder"])):
        (tmp_path / "models" / "student" / "config.pbtxt").write_text(as_text(config))
        for command in (compose, runtime["spec"]["containers"][0]["command"][2], chart):
            assert started(command, tmp_path) == loaded
    # no shell can look into a bucket
    values = {"models": {"uri": "s3://b/m"}, "students": {"arms": [{"name": "student", "cascade": True}]}}
    of_bucket = pods(render(values))["search-students"]["spec"]["containers"][0]["command"][2]
    assert started(of_bucket, tmp_path) == [*both, "student_first_encoder"]


def test_a_router_reaches_students_elsewhere_where_it_is_told_of_them():
    """Seen: the policies closed the way to the students of deploy/kserve.yaml."""
    text = (ROOT / "deploy" / "kserve.yaml").read_text().replace("\\\n#", "")
    set_values = dict(re.findall(r"--set-json\s+'(router\.\w+)=(.*?)'", text))
    router = {name.partition(".")[2]: json.loads(value) for name, value in set_values.items()}
    off = {"enabled": False}
    policy = of_kind(render({"students": off, "balancer": off, "router": router}), "NetworkPolicy")["search-router"]
    assert {"to": router["allowedTo"]} in policy["spec"]["egress"]
    assert all("to" in rule for rule in policy["spec"]["egress"])


needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (apt: prometheus)")


def rules_of(manifests: list[Manifest]) -> dict[str, Manifest]:
    (rule,) = of_kind(manifests, "PrometheusRule").values()
    (group,) = rule["spec"]["groups"]
    return {each["alert"]: each for each in group["rules"]}


@pytest.mark.parametrize("name", ["fleet", "cpu-only"])
def test_the_rules_are_those_of_compose_but_for_the_namespace_and_the_replicas(rendered, name, tmp_path):
    rules = rules_of(rendered[name])
    alerts = yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text().replace(
        'job="router"', 'job="router",namespace="ranking"'))  # fmt: skip
    expected = {each["alert"]: each for each in alerts["groups"][0]["rules"]}
    expected["StudentMissing"]["expr"] = rules["StudentMissing"]["expr"]
    assert rules == expected
    jobs = {job for each in rules.values() for job in re.findall(r'job="(\w+)"', each["expr"])}
    monitors = of_kind(rendered[name], "PodMonitor").values()
    found = {m["spec"]["selector"]["matchLabels"][m["spec"]["jobLabel"]] for m in monitors}
    assert jobs == {"router"} and jobs <= found  # a rule on a job that no monitor makes would never fire
    if shutil.which("promtool"):
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": list(rules.values())}]}))
        subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yaml"], check=True, capture_output=True)


def test_nobody_is_paged_for_what_is_not_started():
    off, on = {"enabled": False}, {"enabled": True}
    teacher_alone = render({"students": off, "balancer": off, "router": off, "teacher": on, "monitoring": on})
    everything = rules_of(render({"monitoring": on})).keys()
    assert everything - rules_of(teacher_alone).keys() == {"RouterDown", "StudentMissing"}
    asleep = rules_of(render({"students": {"replicas": 0}, "monitoring": on})).keys()
    assert everything - asleep == {"StudentMissing"}


STABLE = [f"search-students-7d9f8c6b5-{name}" for name in ("abcde", "fghij", "klmno", "pqrst")]
CANARY = "search-students-canary-5c4d3b2a1-uvwxy"


@needs_promtool
@pytest.mark.parametrize(
    ("pods_of", "missing"),
    [
        ({"student": [*STABLE, CANARY], "baseline": [*STABLE, CANARY]}, []),
        ({"student": [*STABLE[:3], CANARY], "baseline": [*STABLE, CANARY]}, [{"model": "student"}]),
        ({"student": STABLE, "baseline": [CANARY]}, [{"model": "baseline", "namespace": "ranking"}]),
        ({"student": STABLE, "baseline": STABLE, "other": STABLE[:1]}, []),  # in the repository, but no arm
    ],
)
def test_a_stable_replica_without_an_arm_is_missed_whatever_the_canary_serves(rendered, pods_of, missing, tmp_path):
    """Two versions of each arm are loaded, and another namespace has a fleet of the same name."""
    alert = rules_of(rendered["fleet"])["StudentMissing"]
    served = [("ranking", model, pod) for model, pods in pods_of.items() for pod in pods]
    served += [("staging", model, pod) for model in ("student", "baseline") for pod in STABLE]
    series = [
        {
            "series": f'nv_inference_request_success{{namespace="{namespace}",pod="{pod}",'
            f'model="{model}",version="{version}"}}',
            "values": "0+1x20",
        }
        for namespace, model, pod in served
        for version in (3, 4)
    ]
    fired = [
        {
            "exp_labels": {"severity": "page", **labels},
            "exp_annotations": {"summary": f"a replica serves no {labels['model']}"},
        }
        for labels in missing
    ]
    check = {"eval_time": "5m", "alertname": "StudentMissing", "exp_alerts": fired}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": [alert]}]}))
    tests = [{"interval": "30s", "input_series": series, "alert_rule_test": [check]}]
    (tmp_path / "cases.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "30s", "tests": tests})
    )
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "cases.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_autoscaler_counts_waiting_and_busy_requests_of_the_stable_replicas(rendered, tmp_path):
    """Two replicas: one where 3 requests wait and 4 are worked on, one idle; and a canary, which does not count."""
    triggers = of_kind(rendered["fleet"], "ScaledObject")["search-students"]["spec"]["triggers"]
    seconds = {"queue": (3, 0, 50), "request": (7, 0, 90)}  # a second of time in each state, by pod
    names = (
        "search-students-7d9f8c6b5-abcde",
        "search-students-7d9f8c6b5-fghij",
        "search-students-canary-5c4d3b2a1-klmno",
    )
    series = [
        {
            "series": f'nv_inference_{state}_duration_us{{namespace="ranking",pod="{pod}",model="student"}}',
            "values": f"0+{each * 15_000_000}x20",  # a scrape every 15 seconds
        }
        for state, values in seconds.items()
        for pod, each in zip(names, values)
    ]
    expected = {"waiting-requests": 3, "busy-requests": 4}
    checks = [
        {
            "expr": t["metadata"]["query"],
            "eval_time": "4m",
            "exp_samples": [{"labels": "{}", "value": expected[t["name"]]}],
        }
        for t in triggers
    ]
    tests = {
        "evaluation_interval": "15s",
        "tests": [{"interval": "15s", "input_series": series, "promql_expr_test": checks}],
    }
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "queries.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(t["metricType"] == "AverageValue" for t in triggers)  # a sum over replicas is divided by their number


def test_the_balancer_is_compose_s_but_for_the_replicas_addresses(rendered, tmp_path):
    text = of_kind(rendered["fleet"], "ConfigMap")["search-balancer"]["data"]["nginx.conf"]
    ours = (ROOT / "deploy" / "nginx.conf").read_text().splitlines()
    theirs = text.splitlines()
    assert [line for line in ours if line not in theirs] == [line for line in ours if "server students-1" in line]
    added = [line.strip() for line in theirs if line not in ours]
    assert len(added) == 3 and added[0].startswith("resolver ") and all(" resolve " in line for line in added[1:])
    if shutil.which("nginx"):  # Debian's is older than the `resolve` of a server: all but this word is checked
        plain = text.replace(" resolve ", " ").replace("search-students.ranking.svc.cluster.local", "127.0.0.1")
        plain = re.sub(r"resolver \S+", "resolver 127.0.0.1", plain).replace("/tmp/", f"{tmp_path}/")
        (tmp_path / "nginx.conf").write_text(plain)
        command = ["nginx", "-t", "-c", str(tmp_path / "nginx.conf"), "-e", "stderr"]
        checked = subprocess.run(command, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def given_flags(container: Manifest) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in container["args"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_programs_know_the_flags_that_they_are_given(rendered, name):
    found = pods(rendered[name])
    given = given_flags(found["search-router"]["spec"]["containers"][0])
    assert {flag.replace("-", "_") for flag in given} <= {f.name for f in dataclasses.fields(RouterConfig)}
    for workload, pod in found.items():
        if workload.startswith("search-labelling"):
            given = given_flags(pod["spec"]["containers"][0])
            assert {flag.replace("-", "_") for flag in given} <= {f.name for f in dataclasses.fields(LabelConfig)}
            teachers = of_kind(rendered[name], "StatefulSet")["search-teacher"]["spec"]
            hosts = [f"search-teacher-{i}.{teachers['serviceName']}:8001" for i in range(teachers["replicas"])]
            assert given["url"].split(",") == hosts and "search-teacher" in of_kind(rendered[name], "Service")


def test_every_program_that_sends_spans_is_told_where_to_and_may_reach_it(rendered):
    values = {**example("fleet"), "tracing": {"endpoint": "http://collector.monitoring:4319", "ratio": 0.25}}
    values["labelling"] = {**values.get("labelling", {}), "enabled": True}
    values["teacher"] = {**values.get("teacher", {}), "enabled": True}
    traced = render(values)
    for manifest in traced:
        if manifest["apiVersion"] in NATIVE:
            kubernetes_validate.validate(manifest, "1.37", strict=True)
    reaches = {
        policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for policy in of_kind(traced, "NetworkPolicy").values()
        for rule in policy["spec"]["egress"]
        for port in rule["ports"]
        if (port["port"], component(rule["to"][0])) == (4319, "monitoring")
    }
    assert reaches == {"students", "router", "labelling"}
    for workload, pod in pods(traced).items():
        container = pod["spec"]["containers"][0]
        env = {each["name"]: each.get("value") for each in container.get("env", [])}
        if workload.split("-")[1] not in reaches:
            assert not any(name.startswith("OTEL") for name in env)
            continue
        assert env["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector.monitoring:4319"
        assert (env["OTEL_TRACES_SAMPLER"], env["OTEL_TRACES_SAMPLER_ARG"]) == ("parentbased_traceidratio", "0.25")
        if workload.startswith("search-students"):
            # the form that docs/operations.md gives, which tests/e2e/test_tracing.py starts
            wanted = (
                "--trace-config mode=opentelemetry --trace-config opentelemetry,url=http://collector.monitoring:4319"
            )
            assert wanted + "/v1/traces --trace-config rate=0" in " ".join(container["command"][2].split())
            assert env["DISRANKER_TRACING"] == "1"  # the name in serving/front/model.py
        else:
            assert given_flags(container)["tracing"] == "true"
    plain = yaml.safe_dump_all(rendered["fleet"])
    assert "OTEL" not in plain and "--tracing" not in plain and "trace-config" not in plain


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_experiment_file_is_one_that_the_router_reads(rendered, name, tmp_path):
    path = tmp_path / "experiments.yaml"
    path.write_text(of_kind(rendered[name], "ConfigMap")["search-router"]["data"]["experiments.yaml"])
    arms = {arm["name"] for arm in example(name)["students"].get("arms", [{"name": "student"}])}
    assert ExperimentFile(path).current.default_model in arms


def test_a_pod_is_given_the_time_that_it_needs_to_stop(rendered):
    for name in EXAMPLES:
        router = pods(rendered[name])["search-router"]["spec"]
        given = given_flags(router["containers"][0])
        assert router["terminationGracePeriodSeconds"] > float(given["drain-seconds"]) + float(given["stop-seconds"])
        students = pods(rendered[name])["search-students"]["spec"]
        pause = float(students["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        assert students["terminationGracePeriodSeconds"] > pause + 30  # Triton's own exit timeout
        config = of_kind(rendered[name], "ConfigMap")["search-balancer"]["data"]["nginx.conf"]
        assert pause > float(re.search(r"valid=(\d+)s", config)[1]) + 5  # the address is forgotten before it goes


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"student": {}}, "student"),
        ({"students": {"replica": 3}}, "replica"),
        ({"students": {"canary": {"enabled": True, "arms": [{"name": "student"}]}}}, "version"),
        ({"students": {"canary": {"enabled": True}}}, "students.canary.arms: name at least one arm"),
        ({"students": {"arms": [{"name": "student", "version": 1}, {"name": "baseline"}]}}, "or none of them"),
        ({"students": {"arms": [{"name": "a; rm -rf", "version": 1}]}}, "name"),
        ({"models": {"uri": "s3://b/m"}, "students": {"arms": [{"name": "student", "version": 1}]}}, "claim alone"),
        ({"models": {"claim": "", "uri": "s3://b/m"}, "teacher": {"enabled": True}}, "bucket will not do"),
        ({"labelling": {"enabled": True}}, "teacher.enabled"),
        ({"tracing": {"endpoint": "collector:4317"}}, "endpoint"),
        ({"balancer": {"enabled": False}}, "router: without balancer and students it asks nobody"),
        ({"students": {"enabled": False}}, "router: without balancer and students it asks nobody"),
        ({"students": {"arms": [{"name": "student"}, {"name": "student"}]}}, "an arm is named twice"),
        ({"students": {"autoscaling": {"enabled": True, "minReplicas": 9}}}, "minReplicas is above maxReplicas"),
        ({"teacher": {"enabled": True, "replicas": 0}, "labelling": {"enabled": True}}, "teacher.replicas is 0"),
        (
            {"students": {"arms": [{"name": "student", "version": 1}, {"name": "baseline", "version": 1}],
                          "canary": {"enabled": True, "arms": [{"name": "student", "version": 2}]}}},
            "students.canary.arms: name all arms of students.arms (student, baseline)",
        ),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused_with_the_reason(values, complaint):
    with pytest.raises(helm.HelmError, match=re.escape(complaint)):
        render(values)


def pin(published: Path, models: Path, pinned: str) -> subprocess.CompletedProcess:
    """Run the script of the init container as it is rendered."""
    values = {"students": {"arms": [{"name": "student", "version": 2}]}}
    init = pods(render(values))["search-students"]["spec"]["initContainers"][0]
    places = {"PINNED": pinned, "PUBLISHED": str(published), "MODELS": str(models), "PATH": "/usr/bin:/bin"}
    assert set(places) - {"PATH"} == {each["name"] for each in init["env"]}
    return subprocess.run(init["command"], env=places, capture_output=True, text=True)


def test_a_pinned_replica_serves_its_version_whatever_is_promoted(tmp_path):
    published, models = tmp_path / "published", tmp_path / "models"
    write_toy_repository(published)
    (published / "baseline").rename(published / "student_encoder")
    for model in ("student", "student_encoder"):
        shutil.copy(published / model / "config.pbtxt", published / model / "1")
        for version in ("2", "3"):
            shutil.copytree(published / model / "1", published / model / version)
        (models / model).mkdir(parents=True)
        shutil.copy(published / model / "delay", models / model)
        promoted = (
            published / model / "config.pbtxt"
        ).read_text() + "version_policy: { specific: { versions: [3] } }\n"
        (published / model / "config.pbtxt").write_text(promoted)
    refused = pin(published, models, "student=9")
    assert refused.returncode == 1 and "student/9: no such published version" in refused.stderr
    assert pin(published, models, "student=2").returncode == 0
    flags = ("--model-control-mode=explicit", "--load-model=student", "--load-model=student_encoder")
    with start_triton(models, *flags) as server:
        assert RunningServer(server.grpc, 30.0, None).versions("student", "READY") == [2]


def labelling_client(tmp_path: Path, rendered: dict, script: str) -> subprocess.Popen:
    """The Job's shell, with a `python` that does what `script` says."""
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    (job,) = (pod for name, pod in pods(rendered["fleet"]).items() if "labelling" in name)
    container = job["spec"]["containers"][0]
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    return subprocess.Popen(
        [*container["command"], *container["args"]], env=variables, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("code", "outcome"), [(0, 0), (3, 0), (1, 1), (130, 130)])
def test_a_labelling_run_that_finished_with_rejects_is_no_failed_job(rendered, tmp_path, code, outcome):
    client = labelling_client(tmp_path, rendered, f'echo "$@"; exit {code}')
    printed, _ = client.communicate(timeout=60)
    assert client.returncode == outcome
    assert printed.startswith("clients/label_corpus.py --candidates=/data/candidates.parquet ")


def test_a_labelling_job_that_is_ended_lets_the_client_finish_its_shard(rendered, tmp_path):
    script = (
        f"trap 'sleep 0.3; touch {tmp_path}/finished; exit 130' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    )
    client = labelling_client(tmp_path, rendered, script)
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(client.pid, signal.SIGTERM)
    client.communicate(timeout=60)
    assert client.returncode == 130 and (tmp_path / "finished").exists()


def test_the_kserve_manifest_starts_triton_as_compose_does_and_locks_it():
    runtime, service = yaml.safe_load_all((ROOT / "deploy" / "kserve.yaml").read_text())
    (container,) = runtime["spec"]["containers"]
    students = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["students-1"]
    assert flags(container["command"][2]) - flags(students["command"][2]) == {"--grpc-port=9000"}
    assert flags(students["command"][2]) <= flags(container["command"][2])
    lock = container["securityContext"]
    assert lock["runAsNonRoot"] and lock["readOnlyRootFilesystem"] and lock["capabilities"] == {"drop": ["ALL"]}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in runtime["spec"]["volumes"]}
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    known = [(found["name"], found["version"]) for found in runtime["spec"]["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in known
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
