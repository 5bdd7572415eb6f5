"""What the label budget's table says of the results."""

from benchmarks.students.label_budget import labels_for, table


def line(row: str, share: float, labels: int, test: float, seed: int = 1) -> dict:
    return {"row": row, "seed": seed, "share": share, "labels": labels, "test": test}


def test_labels_for_a_goal_lie_between_two_budgets_on_a_logarithmic_line():
    means = {1000: 0.70, 2000: 0.80, 4000: 0.80, 8000: 0.90}
    assert labels_for(0.70, means) == "at most 1,000"
    assert labels_for(0.75, means) == "1,400"  # half of the way in log(labels): 1,414
    assert labels_for(0.80, means) == "2,000"
    assert labels_for(0.91, means) == "more than 8,000"


def test_the_table_has_means_over_seeds_and_what_each_goal_takes():
    lines = [
        line("all", 1, 90_000, 0.79),
        line("all", 1, 90_000, 0.81, seed=2),
        line("random", 0.1, 1001, 0.700),
        line("random", 0.1, 999, 0.720, seed=2),  # a query with few candidates leaves a label or two
        line("random", 0.2, 2000, 0.784),
        line("bands", 0.1, 1000, 0.5),
    ]
    shown = table(lines)
    assert "all labels: 0.8000 ± 0.0100 over 2 seeds; 90% of it is 0.7200, 98% of it is 0.7840" in shown
    assert "| random | 0.7100 ± 0.0100 | 0.7840 ± 0.0000 | 1,100 | 2,000 |" in shown
    assert "| bands | 0.5000 ± 0.0000 |  | more than 1,000 | more than 1,000 |" in shown
