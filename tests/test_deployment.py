"""compose.yaml and what it mounts: valid, complete, and the same alerts in the rules and in the runbook."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    """Distributions that a Dockerfile's pip line brings, with all that they need, as this interpreter has them."""
    text = (ROOT / "deploy" / dockerfile).read_text().replace("\\\n", " ")
    (line,) = re.findall(r"pip install .*?-c \S+ (.*)", text)
    wanted = [Requirement(word) for word in shlex.split(line) if not word.startswith("$")]
    found: set[str] = set()
    while wanted:
        needed = wanted.pop()
        name = canonicalize_name(needed.name)
        extras = needed.extras or {""}
        if name in found and not needed.extras:
            continue
        found.add(name)
        for text in metadata.requires(name) or []:
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(further)
    return found


def run_with_only(packages: set[str], command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a program that can import the repository and these distributions, and nothing else that is installed here."""
    owners = metadata.packages_distributions()
    known = {module for module, owned in owners.items() if packages & {canonicalize_name(name) for name in owned}}
    hidden = sorted(set(owners) - known)
    (folder / "sitecustomize.py").write_text(
        f"import sys\nfrom importlib.machinery import PathFinder\nhidden = set({hidden!r})\n"
        "class Known:\n    def find_spec(self, name, path=None, target=None):\n"
        "        absent = name.partition('.')[0] in hidden\n"
        "        return None if absent else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not PathFinder] + [Known()]\n"
    )
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
    imports = "import ranking.encoder_inputs, ranking.text, ranking.card, numpy"
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


def students_command(arms: str, folder: Path) -> list[str]:
    """What the students' command line becomes in the container: the arguments that tritonserver gets."""
    printer = folder / "tritonserver"
    printer.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    printer.chmod(0o755)
    shell, flag, script = COMPOSE["services"]["students-1"]["command"]
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "ARMS": arms}
    command = [shell, flag, script.replace("$$", "$")]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.splitlines()


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
