"""The README's tables of results have the figures of the pages that measured them, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.readme_figures import Config, as_shown, main, rows_with_figures, value_of
from ranking.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path) -> Path:
    """README and pages, to be changed."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path}: {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_the_readme_has_the_figures_of_its_pages(capsys):
    main(Config())
    assert len(rows_with_figures((ROOT / "README.md").read_text(encoding="utf-8"))) > 10
    assert "0 rows differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    "page, old, new, row",
    [
        ("results/demo.md", "| 0.888 | 0.886 |", "| 0.888 | 0.879 |", "`make demo DATA=`"),
        ("results/demo.md", "CTR | +6.5% [+4.4%, +8.5%]", "CTR | -0.1% [-3.0%, +2.9%]", "its A/B test"),
        ("results/clicklog.md", "| 60,000,000 | 2.05 |", "| 50,000,000 | 2.05 |", "million click events"),
        ("results/ab_calibration.md", "| user CTR | 4.5% |", "| user CTR | 3.6% |", "A/A experiments"),
        ("results/student_training.md", "| 1.30 | 0.8250 |", "| 1.31 | 0.8250 |", "distilling beside"),
        ("world.md", "70% of the test queries", "60% of the test queries", "| built-in world"),
    ],
)
def test_a_page_that_changes_changes_its_row_of_the_readme(copy, capsys, page, old, new, row):
    change(copy / "docs" / page, old, new)
    with pytest.raises(InputError, match="1 rows differ"):
        main(Config(copy))
    assert row in capsys.readouterr().out
    main(Config(copy, write=True))
    main(Config(copy))
    lines = (copy / "README.md").read_text(encoding="utf-8").splitlines()
    before = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [row in line for line, was in zip(lines, before, strict=True) if line != was] == [True]


def test_a_figure_of_the_readme_without_a_source_is_refused(copy):
    change(copy / "README.md", "page CTR +6.5%", "99 of 100 users, page CTR +5.1%")
    with pytest.raises(InputError, match="'its A/B test' shows 15 figures, its sources give 13"):
        main(Config(copy))


def test_a_row_of_the_readme_without_an_entry_is_refused(copy):
    change(copy / "README.md", "| its A/B test", "| nobody's test")
    with pytest.raises(InputError, match=r"0 entries .* for the row \"\| nobody's test"):
        main(Config(copy))


def test_a_line_that_is_gone_from_a_page_is_named(copy):
    change(copy / "docs" / "results" / "ab_calibration.md", "always-valid interval, any of", "the interval in any of")
    with pytest.raises(InputError, match=r"ab_calibration.md: nothing reads '\| always-valid interval"):
        main(Config(copy))


@pytest.mark.parametrize(
    "value, shown, new",
    [
        ("-0.0512", "+0.026", "-0.051"), ("17.5%", "17%", "18%"), ("60,000,000", "5 million", "60 million"),
        ("1449.6", "1,500", "1,450"), ("0.05", "5%", "5%"), ("3.1%", "4%", "3%"),
    ],
)  # fmt: skip
def test_a_figure_keeps_its_form(value, shown, new):
    assert as_shown(value_of(value), shown) == new
