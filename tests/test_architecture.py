"""The rooms and the one direction of their imports (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("ranking", "training", "build", "serving", "clients", "loadtest")
HEAVY = {"torch", "transformers", "accelerate", "peft", "vllm", "openvino", "tensorrt", "onnxruntime"}
NETWORK = {"tritonclient", "requests", "httpx", "grpc", "fastapi", "uvicorn", "aiohttp"}


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_ranking_and_itself(room):
    others = set(ROOMS) - {room, "ranking"} | {"benchmarks", "tests"}
    offenders = {str(p.relative_to(ROOT)): found for p in sources(room) if (found := imported_names(p) & others)}
    assert not offenders


def test_ranking_needs_neither_torch_nor_network():
    offenders = {p.name: found for p in sources("ranking") if (found := imported_names(p) & (HEAVY | NETWORK))}
    assert not offenders


def test_clients_and_load_tests_stay_light():
    found = {
        p.name: bad for room in ("clients", "loadtest") for p in sources(room) if (bad := imported_names(p) & HEAVY)
    }
    assert not found


def test_nothing_imports_tensorrt_at_module_level():
    for path in (p for room in ROOMS for p in sources(room)):
        top = ast.parse(path.read_text(encoding="utf-8")).body
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert not {n for n in names if n.split(".")[0] == "tensorrt"}, path
