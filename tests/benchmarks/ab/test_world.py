"""The page of the A/B benchmark says no more than the report does."""

from __future__ import annotations

from benchmarks.ab.world import results_page

QUALITY = {"baseline": {"ndcg@5": 0.6}, "student": {"ndcg@5": 0.7}, "bm25": {"ndcg@5": 0.5}}
CLICKS = {"clicks": [1.5, 1.6], "grade_4": [1.2, 1.1], "dwell": [100.0, 99.0]}


def metric(name: str, control: float, treatment: float, width: float) -> dict:
    lift = treatment / control - 1
    ends = {"low": lift - width, "high": lift + width, "always_low": lift - 2 * width, "always_high": lift + 2 * width}
    texts = {"control_text": f"{control:.2f}", "treatment_text": f"{treatment:.2f}"}
    return (
        {
            "name": name,
            "control": control,
            "treatment": treatment,
            "lift": lift,
            "p": 0.5,
            "adjusted_p": 0.9,
            "reason": "",
        }
        | ends
        | texts
    )


def page(ctr: dict, truth: dict[str, float]) -> str:
    none = metric("fallback share", 1.0, 1.0, 0.0) | {"lift": None, "reason": "no lift: zero"}
    report = {
        "metrics": [ctr, metric("dwell per click", 86.0, 84.0, 0.001), none],
        "users": {"baseline": 600, "student": 400},
        "pages": 3000,
        "first": "2026-01-01T10:00:00+00:00",
        "last": "2026-01-01T10:01:00+00:00",
        "srm_p": 0.4,
        "verdict": "Mixed: better and worse.",
    }
    return results_page(report, truth, QUALITY, CLICKS, "A note.")


def test_better_is_said_of_page_ctr_alone_beside_the_verdict_and_all_metrics():
    text = page(metric("page CTR", 0.5, 0.55, 0.02), {"baseline": 0.5, "student": 0.545})
    assert "On page CTR the student is better**, and the 95% interval covers the true lift" in text
    assert "Verdict of the report: Mixed: better and worse." in text
    assert "| dwell per click | 86.00 | 84.00 | -2.33% [-2.43%, -2.23%] |" in text
    assert "| fallback share | 1.00 | 1.00 | no lift: zero |" in text
    assert "| clicks on documents of grade 4 | 1.200 | 1.100 |" in text
    assert "1,000 simulated users with 3,000 pages" in text and "1.0 minutes of traffic,\n50 pages/s. A note." in text
    assert "baseline 0.600, student 0.700." in text


def test_an_interval_that_holds_zero_or_misses_the_truth_is_said_to():
    text = page(metric("page CTR", 0.5, 0.505, 0.02), {"baseline": 0.5, "student": 0.6})
    assert "On page CTR the student is neither better nor worse**, and the 95% interval does not cover" in text
