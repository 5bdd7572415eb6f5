"""What the watch found, and which of it is an alert: large enough, and no accident of looking at many things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from clients.ab.report.statistics import holm

# check -> what to do, one line each; deploy/watch_alerts.yaml has the same checks
RUNBOOK = {
    "score_drift": "compare the day's queries with the build's candidates; label some and retrain (make retrain)",
    "query_mix": "new queries arrive: look at their click rate, sample and label them, retrain",
    "unknown_tokens": "text in a language or script that the vocabulary lacks: look at a sample of it",
    "cut_fields": "documents or queries grew: raise the field limits with the next student, or send better snippets",
    "calibration": "thresholds on probability are off: fit the map again on fresh judgments and build again",
    "click_rate": "fewer pages are clicked than before: compare arms, latency and catalogue; roll back if an arm fell",
    "latency": "pages are slower than before: docs/operations.md, PageP99High",
}


@dataclass(frozen=True)
class Finding:
    """One figure of one arm or segment beside its reference.

    check: one of RUNBOOK; where: labels; value, reference: in the check's unit; limit: the value from which it is
    large; large: whether it is; p: of no change, None where the figure is no test; adjusted: p among all tests (Holm);
    note: what the figure takes for granted.
    """

    check: str
    where: dict[str, str]
    value: float
    reference: float
    limit: str
    large: bool
    p: float | None = None
    adjusted: float | None = None
    alert: bool = False
    note: str = ""


def judged(findings: Sequence[Finding], alpha: float) -> list[Finding]:
    """The findings with their alerts: large, and where there is a test, significant among all of the day's tests."""
    tested = [finding for finding in findings if finding.p is not None]
    adjusted = dict(zip(map(id, tested), holm([finding.p for finding in tested if finding.p is not None])))
    result = []
    for finding in findings:
        p = adjusted.get(id(finding))
        result.append(replace(finding, adjusted=p, alert=finding.large and (p is None or p < alpha)))
    return result
