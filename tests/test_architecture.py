"""docs/architecture.md and the code agree: its tree names every file, its table has every import between folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import code_map
from tests.helpers.code_map import ROOT, SERVED, TOP_FOLDERS

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TREE, TABLE = "The tree", "Who may import whom"
HEAVY = {"torch", "transformers", "accelerate", "peft", "vllm", "openvino", "tensorrt", "onnxruntime"}
NETWORK = {"tritonclient", "requests", "httpx", "grpc", "fastapi", "uvicorn", "aiohttp"}
MOST_ENTRIES = 16  # programs and folders at the top of a folder: what a person takes in at one look
MOST_ARROWS = {"training": 25, "clients": 16}


def packages(path: Path, top_level_only: bool = False) -> set[str]:
    return {name.split(".")[0] for name in code_map.imports(path, top_level_only)}


def test_the_code_imports_what_the_table_says_and_nothing_else():
    allowed = code_map.allowed_arrows(PAGE, TABLE)
    assert code_map.differences(allowed, code_map.code_arrows(ROOT, TOP_FOLDERS)) == []


def test_folders_form_no_circle():
    assert code_map.circles(code_map.code_arrows(ROOT, TOP_FOLDERS)) == []


def test_the_tree_names_every_folder_and_file():
    missing = code_map.missing_from_tree(ROOT, TOP_FOLDERS, code_map.tree_paths(PAGE, TREE))
    # of the benchmarks a line per folder is enough: each is one measurement, named like its page in docs/results/
    assert [path for path in missing if path.endswith("/") or not path.startswith("benchmarks/")] == []


def test_every_path_of_the_tree_exists():
    assert [path for path in code_map.tree_paths(PAGE, TREE) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("folder", MOST_ARROWS)
def test_a_large_folder_stays_readable_at_its_top(folder):
    entries = [
        p for p in (ROOT / folder).iterdir() if (p.suffix == ".py" and p.stem != "__init__") or list(p.glob("*.py"))
    ]
    assert len(entries) <= MOST_ENTRIES
    arrows = code_map.entry_arrows(ROOT, folder)
    assert len(arrows) <= MOST_ARROWS[folder], sorted(arrows)


def test_no_folder_but_the_benchmarks_imports_tests():
    files = [p for folder in (*SERVED, "demo") for p in code_map.sources(ROOT, folder)]
    assert [p for p in files if packages(p) & {"tests", "benchmarks"}] == []


def test_ranking_needs_neither_torch_nor_network():
    found = {p.name: bad for p in code_map.sources(ROOT, "ranking") if (bad := packages(p) & (HEAVY | NETWORK))}
    assert not found


def test_clients_and_load_tests_stay_light():
    files = [p for folder in ("clients", "loadtest") for p in code_map.sources(ROOT, folder)]
    assert not {p.name: bad for p in files if (bad := packages(p) & HEAVY)}


def test_nothing_imports_tensorrt_at_module_level():
    files = [p for folder in SERVED for p in code_map.sources(ROOT, folder)]
    assert [p for p in files if "tensorrt" in packages(p, top_level_only=True)] == []


# The checks themselves, on a small tree that they must find fault with.

SMALL_PAGE = """# Map

## The tree
```
shop/          what is sold
  till.py       takes money
  stock/        what there is
    shelf.py    counts it
    far/box.py  a folder of one file, in one line

words/
  price.py     a price
```

## Who may import whom
| folder | imports |
|---|---|
| `shop` | `shop/stock`, `words` |
| `shop/stock` | `words` |
| `shop/stock/far` | nothing |
| `words` | nothing |

## Other
| `shop` | `not/of/this/table` |
"""
SMALL_CODE = {
    "shop/__init__.py": "",
    "shop/till.py": "import json\nfrom shop.stock import shelf\nfrom words.price import PRICE\n",
    "shop/stock/__init__.py": "",
    "shop/stock/shelf.py": "def count():\n    import words.price\n",
    "shop/stock/far/box.py": "",
    "words/__init__.py": "",
    "words/price.py": "PRICE = 1\n",
}


@pytest.fixture
def small(tmp_path: Path):
    """A function (changed files: path=source) -> root of the small tree with these changes."""

    def make(changes: dict[str, str]) -> Path:
        for name, source in (SMALL_CODE | changes).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(source)
        return tmp_path

    return make


def said(root: Path, page: str = SMALL_PAGE) -> list[str]:
    return code_map.differences(code_map.allowed_arrows(page, TABLE), code_map.code_arrows(root, ("shop", "words")))


def unnamed(root: Path) -> list[str]:
    return code_map.missing_from_tree(root, ("shop", "words"), code_map.tree_paths(SMALL_PAGE, TREE))


def test_a_tree_that_agrees_with_its_page_passes(small):
    root = small({})
    assert said(root) == unnamed(root) == code_map.circles(code_map.code_arrows(root, ("shop", "words"))) == []
    assert all((root / path).exists() for path in code_map.tree_paths(SMALL_PAGE, TREE))
    assert code_map.entry_arrows(root, "shop") == {("till.py", "stock")}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"words/price.py": "import shop.till\n"}, "words imports shop, which its row lacks"),
        ({"words/price.py": "def f():\n    from shop import stock\n"}, "words imports shop/stock, which its row lacks"),
        ({"shop/stock/shelf.py": ""}, "shop/stock imports words no more"),
        ({"shop/new/thing.py": ""}, "shop/new has no row in the table"),
    ],
)
def test_an_import_that_table_and_code_do_not_share_is_found(small, changes, fault):
    assert said(small(changes)) == [fault]


def test_a_row_without_a_folder_is_found(small):
    page = SMALL_PAGE.replace("| `words` | nothing |", "| `words` | nothing |\n| `gone` | `words` |")
    assert said(small({}), page) == ["gone has a row, but no Python file"]


@pytest.mark.parametrize("path", ["shop/other.py", "shop/stock/deep.py"])
def test_a_file_that_the_tree_does_not_name_is_found(small, path):
    assert unnamed(small({path: ""})) == [path]


def test_a_folder_that_the_tree_does_not_name_is_found(small):
    assert unnamed(small({"shop/new/__init__.py": ""})) == ["shop/new/"]


@pytest.mark.parametrize("back", ["import shop.till", "from shop.stock.far import box"])
def test_a_circle_is_found_with_its_folders_alone(small, back):
    root = small({"words/price.py": f"{back}\n", "shop/stock/far/box.py": "import words\n"})
    found = code_map.circles(code_map.code_arrows(root, ("shop", "words")))
    assert "words" in found
    assert ("shop" in found) == (back == "import shop.till")


def test_a_relative_import_and_a_bad_tree_are_refused(small):
    with pytest.raises(ValueError, match="relative import"):
        code_map.code_arrows(small({"shop/till.py": "from . import stock\n"}), ("shop", "words"))
    with pytest.raises(ValueError, match="not a line of a tree"):
        code_map.tree_paths(SMALL_PAGE.replace("till.py       takes", "till.py takes"), TREE)
