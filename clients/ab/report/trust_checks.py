"""What must hold before any lift is believed: the planned shares, no user in both arms, no user who makes most
pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clients.ab.report.experiment_pages import ExperimentPages
from clients.ab.report.statistics import sample_ratio_p

SAMPLE_RATIO_ALARM = 0.001  # the usual threshold for a sample-ratio mismatch (Fabijan et al. 2019)
LEAK_ALARM = 0.001  # share of users seen in both arms
HEAVY_ALARM = 0.01  # share of all pages made by one user


@dataclass(frozen=True)
class TrustCheck:
    """One check and what it found, in words."""

    passed: bool
    text: str


def trust_checks(
    pages: ExperimentPages, weights: Sequence[float], max_pages_per_user: int | None
) -> tuple[list[TrustCheck], float]:
    """Every check, and the p of the sample ratio. weights: planned shares of control and treatment."""
    control, treatment = pages.users
    p = sample_ratio_p([control, treatment], list(weights))
    planned = " : ".join(f"{weight:g}" for weight in weights)
    leaked = pages.users_in_both_arms / (control + treatment)
    heaviest = f"Pages of the busiest user: {pages.heaviest_user_share:.2%} of all"
    if max_pages_per_user:
        heaviest += (
            f"; {pages.left_out.heavy_users:,} users with more than {max_pages_per_user} pages left out "
            f"({pages.left_out.heavy_pages:,} pages)"
        )
    return [
        TrustCheck(
            p >= SAMPLE_RATIO_ALARM,
            f"Sample ratio: {control:,} : {treatment:,} users for a planned {planned}, p = {p:.4g}",
        ),
        TrustCheck(leaked <= LEAK_ALARM, f"Users seen in both arms: {pages.users_in_both_arms:,} ({leaked:.2%})"),
        # among few users one of them always has a large share
        TrustCheck(pages.heaviest_user_share <= max(HEAVY_ALARM, 10 / (control + treatment)), heaviest),
    ], p
