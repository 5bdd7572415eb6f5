"""What a published version carries is enough to make its text: in a container with `tokenizers` and NumPy alone."""

from __future__ import annotations

import shutil
import subprocess
import sys

from build.publish import FRONT_MODULES, ROOT

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
for absent in ("pyarrow", "duckdb", "jsonargparse", "torch", "transformers"):
    sys.modules[absent] = None
import ranking.encoder_inputs, ranking.limits, ranking.prior, ranking.text, ranking.visible
assert ranking.text.__file__.startswith(sys.argv[1]), ranking.text.__file__
print(ranking.text.normalise("a\\u00a0b"), ranking.visible.is_visible("\\u200b"))
"""


def test_the_text_modules_of_a_version_import_nothing_else_of_ours(tmp_path):
    (tmp_path / "ranking").mkdir()
    for module in FRONT_MODULES:
        shutil.copy(ROOT / module, tmp_path / module)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "a b False\n", done.stderr
