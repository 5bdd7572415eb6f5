"""axe-core, the accessibility checker, in a page that Selenium has open. A package of the tests brings its script."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_RULES = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
_RUN = """
const done = arguments[arguments.length - 1];
axe.run(document, {runOnly: arguments[0]})
  .then(found => done(found.violations.flatMap(one => one.nodes.map(node =>
    `${one.id}: ${node.target.join(" ")}: ${node.failureSummary.split("\\n").slice(1).join(" ")}`))))
  .catch(problem => done(["axe itself failed: " + problem]));
"""


def violations(driver) -> list[str]:
    """What breaks WCAG 2.2, A and AA, contrast and labels among them: `rule: element: how to mend it`."""
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None and spec.origin, "pip install --no-deps -r requirements-no-deps.txt"
    driver.execute_script((Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8"))
    driver.set_script_timeout(60)
    return driver.execute_async_script(_RUN, _RULES)
