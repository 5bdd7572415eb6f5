"""The README's figures, each read from the page of docs/results that measured it.

    python -m benchmarks.readme_figures           # says which figures of the README a page no longer has
    python -m benchmarks.readme_figures --write   # puts the pages' figures into the README

docs/results/readme_figures.yaml names, for each row of the README's tables of results, the lines of pages that its
figures come from, in the order in which the row shows them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from ranking.errors import InputError
from ranking.files import write_text
from ranking.program import run

ROOT = Path(__file__).parents[1]
SOURCES = Path("docs/results/readme_figures.yaml")
SECTION = "## Results so far"

# not within a name: NDCG@5, MiniLM-L6, p50, bf16 and x86-64 hold no figures
_NUMBER = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?%?"
FIGURE = re.compile(rf"(?<![\w@./+-])({_NUMBER})( million)?(?![\w@])")
TAKEN = ("each", "last", "lowest", "highest", "range", "ratio")


@dataclass(frozen=True)
class Source:
    """Where figures of a README row stand.

    page: below docs/, without .md. text: what stands there, a # for each figure and a ~ for each other number; an
    interval in brackets may follow either. part: look only in the table whose header begins so, or below the heading
    that begins so. take: `each` figure of the one place that reads so; those of the `last` of several places; the
    `lowest`, the `highest`, or both (`range`) of one figure over all places; or the `ratio` of the two figures of one
    place.
    """

    page: str
    text: str
    take: str = "each"
    part: str = ""

    def __post_init__(self) -> None:
        if self.take not in TAKEN:
            raise ValueError(f"take is {self.take!r}: one of {', '.join(TAKEN)} is needed")


@dataclass
class Config:
    """Compare the figures of the README's tables with the pages of results.

    Args:
        root: folder of the repository
        write: put the pages' figures into the README instead of failing
    """

    root: Path = ROOT
    write: bool = False


def main(config: Config) -> None:
    """Print each row whose figures its pages no longer have. InputError if there are any and they are not written."""
    readme = config.root / "README.md"
    text = readme.read_text(encoding="utf-8")
    mended = with_figures(text, read_sources(config.root), config.root)
    changed = [(old, new) for old, new in zip(text.splitlines(), mended.splitlines()) if old != new]
    for old, new in changed:
        print(f"README: {old}\npages:  {new}\n")
    if changed and not config.write:
        raise InputError(
            f"{readme}: {len(changed)} rows differ from docs/results; --write puts the pages' figures there"
        )
    if changed:
        write_text(readme, mended)
    print(f"README.md: {len(changed)} rows " + ("changed" if changed else "differ from their pages"))


def read_sources(root: Path) -> dict[str, list[Source]]:
    """Words of a README row -> its sources. InputError for an entry that is none."""
    path = root / SOURCES
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {entry["row"]: [Source(**source) for source in entry["figures"]] for entry in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: each entry has a row and its figures (page, text, take): {error}") from error


def rows_with_figures(readme: str) -> list[str]:
    """The lines of the README's tables of results that hold a figure."""
    section = readme.partition(f"\n{SECTION}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|") and figures_of(line)]


def figures_of(line: str) -> list[re.Match[str]]:
    """The figures of a line, links' targets left out."""
    targets = [range(*target.span()) for target in re.finditer(r"\]\([^)]*\)", line)]
    return [found for found in FIGURE.finditer(line) if not any(found.start() in target for target in targets)]


def with_figures(readme: str, sources: dict[str, list[Source]], root: Path) -> str:
    """The README with the pages' figures, as exact as it shows them.

    InputError for a row without sources, sources without a row, a place that no page has, or a row that shows another
    number of figures than its sources give.
    """
    left = dict(sources)
    for line in rows_with_figures(readme):
        keys = [key for key in sources if key in line]
        if len(keys) != 1:
            raise InputError(f"README.md: {len(keys)} entries of {SOURCES} are for the row {line!r}; one is needed")
        left.pop(keys[0], None)
        values = [value for source in sources[keys[0]] for value in values_of(source, root)]
        shown = figures_of(line)
        if len(values) != len(shown):
            raise InputError(
                f"README.md: the row {keys[0]!r} shows {len(shown)} figures, its sources give {len(values)}"
            )
        mended = line
        for figure, value in reversed(list(zip(shown, values))):
            mended = mended[: figure.start()] + as_shown(value, figure[0]) + mended[figure.end() :]
        readme = readme.replace(line, mended)
    if left:
        raise InputError(f"{SOURCES}: the README has no row with a figure that reads {', '.join(map(repr, left))}")
    return readme


def values_of(source: Source, root: Path) -> list[float]:
    """The figures of a source, percentages as shares."""
    path = root / "docs" / f"{source.page}.md"
    if not path.is_file():
        raise InputError(f"{SOURCES}: no page {path}")
    parts = re.split(r"([#~])", " ".join(source.text.split()))
    interval = r"(?: \[[^\]]*\])?"
    patterns = {"#": f"({_NUMBER}(?: million)?){interval}", "~": f"{_NUMBER}{interval}"}
    pattern = "".join(patterns.get(part, re.escape(part)) for part in parts)
    page = " ".join(part_of(path, source.part).split())
    places = [[value_of(text) for text in found.groups()] for found in re.finditer(pattern, page)]
    if not places:
        raise InputError(f"{path}: nothing reads {source.text!r}, where a figure of the README comes from")
    if source.take in ("each", "ratio") and len(places) > 1:
        raise InputError(f"{path}: {len(places)} places read {source.text!r}, where a figure of the README comes from")
    taken = {
        "lowest": [min(place[0] for place in places)],
        "highest": [max(place[0] for place in places)],
        "ratio": [places[0][0] / places[0][-1]],
    }
    taken["range"] = taken["lowest"] + taken["highest"]
    return taken.get(source.take, places[-1])


def part_of(path: Path, beginning: str) -> str:
    """The page, or the one table or heading with what is below it that begins so. InputError if there is not one."""
    page = path.read_text(encoding="utf-8")
    if not beginning:
        return page
    parts = re.findall(r"^\|(?:.*\n\|)*.*$", page, flags=re.M) + re.split(r"^(?=#+ )", page, flags=re.M)
    found = [part for part in parts if part.startswith(beginning)]
    if len(found) != 1:
        raise InputError(f"{path}: {len(found)} parts begin with {beginning!r}, where a README figure comes from")
    return str(found[0])


def value_of(text: str) -> float:
    """The number that a text shows: 12.5% is 0.125, 60 million is 60,000,000."""
    number = float(text.removesuffix(" million").rstrip("%").replace(",", ""))
    return number / 100 if text.endswith("%") else number * 1e6 if text.endswith(" million") else number


def as_shown(value: float, shown: str) -> str:
    """The value in the form of another figure: its decimals, sign, percent sign and `million`."""
    percent, million = shown.endswith("%"), shown.endswith(" million")
    decimals = len(shown.removesuffix(" million").rstrip("%").partition(".")[2])
    scaled = value * 100 if percent else value / 1e6 if million else value
    sign = "+" if shown.startswith("+") else ""
    return f"{scaled:{sign},.{decimals}f}" + "%" * percent + " million" * million


if __name__ == "__main__":
    run(main, Config, example="python -m benchmarks.readme_figures --write")
