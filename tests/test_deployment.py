"""compose.yaml and what it mounts: valid, complete, and the same alerts in the rules and in the runbook."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from clients.ab.router.metrics import Metrics
from clients.ab_router import Config as RouterConfig
from tests.helpers.installed_packages import hide_all_but, with_all_needs

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
            source = re.sub(r"^\$\{\w+:-(.+?)\}", r"\1", volume).split(":")[0]
            there = source in COMPOSE["volumes"] or source == "./model_repository" or (ROOT / source).exists()
            assert there, f"{name}: {source}"
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"]), name
        if "build" in service:
            dockerfile = ROOT / service["build"]["dockerfile"]
            for line in dockerfile.read_text().splitlines():
                if line.startswith("COPY") and "--from=" not in line:
                    *sources, _ = line.split()[1:]
                    assert all((ROOT / s).exists() for s in sources), line


def test_the_engine_build_finds_the_packages_that_its_image_does_not_install(tmp_path):
    """A stand-in for the container: an interpreter without site packages, and a program below the mounted folder."""
    service = COMPOSE["services"]["build-engine"]
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "__init__.py").touch()
    (tmp_path / "build" / "gate.py").touch()
    (tmp_path / service["entrypoint"][1]).write_text("import build.gate\n")
    variables = {k: v.replace(service["working_dir"], str(tmp_path)) for k, v in service.get("environment", {}).items()}
    command = [sys.executable, "-S", *service["entrypoint"][1:]]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def installed_by(dockerfile: str) -> set[str]:
    """Distributions that a Dockerfile's pip line brings, with all that they need."""
    text = (ROOT / "deploy" / dockerfile).read_text().replace("\\\n", " ")
    (line,) = re.findall(r"pip install .*?-c \S+ (.*)", text)
    return with_all_needs(word for word in shlex.split(line) if not word.startswith("$"))


def run_with_only(packages: set[str], command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a program that can import the repository and these distributions, and nothing else that is installed here."""
    hide_all_but(packages, folder)
    variables = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True)


def test_the_engine_images_packages_are_all_that_the_engine_build_imports(tmp_path):
    """The recipe of deploy/engine.Dockerfile up to TensorRT itself, which no machine without a GPU has."""
    packages = installed_by("engine.Dockerfile")
    assert "torch" not in packages and "transformers" not in packages
    command = ["build/finish_engine.py", "--staged", str(tmp_path / "staged"), "--repository", str(tmp_path / "models")]
    done = run_with_only(packages, command, tmp_path)
    assert done.returncode == 1 and "TensorRT is not installed here" in done.stderr, done.stderr
    imports = "import build.publish, build.tensorrt_engine, polygraphy.backend.trt, onnx, scipy.stats"
    done = run_with_only(packages, ["-c", imports], tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_students_image_has_what_a_published_version_imports(tmp_path):
    imports = "import ranking.encoder_inputs, ranking.text, ranking.card, ranking.tracing as t, numpy; "
    imports += "t.begin('traced').stop(0.1)"
    done = run_with_only(installed_by("students.Dockerfile"), ["-c", imports], tmp_path)
    assert done.returncode == 0, done.stderr


def test_engine_and_students_are_of_one_release_and_the_engine_build_knows_the_servers_tensorrt():
    students = COMPOSE["services"]["students-1"]["build"]["args"]
    engine = COMPOSE["services"]["build-engine"]["build"]["args"]
    assert students["TRITON_IMAGE"] == engine["TRITON_IMAGE"]
    release = engine["TRITON_IMAGE"].partition(":")[2]
    assert engine["TENSORRT_IMAGE"] == f"nvcr.io/nvidia/tensorrt:{release}"
    recipe = (ROOT / "deploy" / "engine.Dockerfile").read_text()
    noted = re.search(r"ENV SERVING_TENSORRT=(\S+)", recipe)
    assert noted and f"COPY --from=serving /serving-tensorrt {noted[1]}" in recipe
    for variable in re.findall(r"^ARG (\w+)$", recipe, re.MULTILINE):
        assert variable in engine


def test_the_teachers_image_has_a_vllm_that_honours_the_float32_head():
    year, month = re.search(r":-.*tritonserver:(\d\d)\.(\d\d)-vllm", COMPOSE["services"]["teacher"]["image"]).groups()
    assert (int(year), int(month)) >= (26, 10)  # vLLM 0.31; 26.07 has 0.24, and 0.26 was the first


def test_the_images_are_no_older_than_the_security_page_allows():
    page = (ROOT / "docs" / "security.md").read_text()
    oldest = re.findall(r"\*\*(\d\d)\.(\d\d) or later\*\*", page)
    image = COMPOSE["services"]["students-1"]["build"]["args"]["TRITON_IMAGE"]
    students = re.search(r"RELEASE:-(\d\d)\.(\d\d)\}", image)
    teacher = re.search(r":(\d\d)\.(\d\d)-", COMPOSE["services"]["teacher"]["image"])
    assert students and teacher and len(oldest) == 2
    assert [students.groups() >= oldest[0], teacher.groups() >= oldest[1]] == [True, True]


def students_command(arms: str, folder: Path, key: str = "secret") -> list[str]:
    """What the students' command line becomes in the container: the arguments that tritonserver gets."""
    (folder / "triton_admin_key").write_text(f"{key}\n")
    printer = folder / "tritonserver"
    printer.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    printer.chmod(0o755)
    shell, flag, script = COMPOSE["services"]["students-1"]["command"]
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "ARMS": arms}
    command = [shell, flag, script.replace("$$", "$").replace("/run/secrets", str(folder))]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_students_do_not_start_without_the_key_that_guards_them(tmp_path):
    guarded = "model-repository,shared-memory,logging,trace:admin-key=secret"
    given = students_command("student", tmp_path)
    assert {f"--http-restricted-api={guarded}", f"--grpc-restricted-protocol={guarded}"} <= set(given)
    with pytest.raises(subprocess.CalledProcessError):
        students_command("student", tmp_path, key="")
    assert COMPOSE["services"]["teacher"]["command"][2].count("$$GUARDED") == 2


def test_every_service_runs_without_root_without_rights_and_within_limits():
    """Seen: containers as root, without limits, on a root file system that they could write to."""
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and not service.get("privileged"), name
        assert service["mem_limit"] and service["pids_limit"], name
        user = service.get("user", "")
        if not service["image"].startswith("prom/"):  # whose images run as nobody
            assert re.fullmatch(r"(\$\{OWNER_UID:-1000\}|\d+):(\$\{OWNER_GID:-1000\}|\d+)", user), name
            assert not user.startswith("0"), name
        if name not in ("build-engine", "releases"):
            assert service["restart"] == "unless-stopped" and service["networks"], name


def test_what_runs_models_has_no_way_out_and_what_stores_has_a_volume():
    assert COMPOSE["networks"]["serving"]["internal"] is True
    for name in ("students-1", "students-2", "build-engine", "releases"):
        assert COMPOSE["services"][name]["networks"] == ["serving"]
    for name, place in (
        ("prometheus", "/prometheus"),
        ("alertmanager", "/alertmanager"),
        ("grafana", "/var/lib/grafana"),
    ):
        assert f"{name}-data:{place}" in COMPOSE["services"][name]["volumes"] and f"{name}-data" in COMPOSE["volumes"]
    # a folder of the host that is not there must stop the router, not be made as root
    assert COMPOSE["volumes"]["ab-log"]["driver_opts"] == {
        "type": "none", "o": "bind", "device": "${PWD}/runs/ab/log",
    }  # fmt: skip


def test_grafana_lets_nobody_in_without_the_password_of_a_secret():
    grafana = COMPOSE["services"]["grafana"]
    assert grafana["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/secrets/grafana_password"
    assert grafana["secrets"] == ["grafana_password"]
    provider = yaml.safe_load((ROOT / "deploy/grafana/dashboards.yaml").read_text())["providers"][0]["options"]["path"]
    assert any(f":{provider}/" in volume for volume in grafana["volumes"])


def test_containers_are_given_the_time_that_they_need_to_stop():
    def seconds(name: str) -> float:
        return float(COMPOSE["services"][name]["stop_grace_period"].rstrip("s"))

    router = RouterConfig(experiment=Path("e"), log=Path("l"), raw_ids=True)
    assert seconds("router") > router.drain_seconds + router.stop_seconds
    assert min(seconds(name) for name in ("students-1", "students-2", "teacher")) > 30  # Triton's own exit timeout


def test_the_students_load_the_arms_of_one_variable_and_by_default_what_the_readme_builds(tmp_path):
    load = [word for word in students_command("student baseline", tmp_path) if word.startswith("--load-model")]
    assert load == [f"--load-model={m}" for m in ("student", "student_encoder", "baseline", "baseline_encoder")]
    built = re.findall(r"build/build_student.py .*--name (\w+) --target tensorrt", (ROOT / "README.md").read_text())
    assert COMPOSE["services"]["students-1"]["environment"]["ARMS"] == f"${{ARMS:-{' '.join(built)}}}"


def test_no_two_running_services_are_given_one_gpu_by_default():
    given = {}
    for name in ("students-1", "students-2", "teacher"):
        (device,) = COMPOSE["services"][name]["deploy"]["resources"]["reservations"]["devices"]
        given[name] = [re.sub(r"\$\{\w+:-(\w+)\}", r"\1", number) for number in device["device_ids"]]
    assert given == {"students-1": ["0"], "students-2": ["1"], "teacher": ["2"]}


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
