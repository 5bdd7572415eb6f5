"""The report's verdict in plain words, with what it rests on."""

from __future__ import annotations

from clients.ab.report.charts import percent
from clients.ab.report.comparison_table import ReportRow
from clients.ab.report.metrics import PAGE_CTR
from clients.ab.report.statistics import FEW_USERS
from ranking.significance import p_text


def verdict(rows: list[ReportRow], trustworthy: bool, users: dict[str, int]) -> str:
    """Who won by the adjusted p of the deciding metrics at the planned end.

    users: how many each arm has by its name, the control first.
    """
    control, treatment = users
    if not trustworthy:
        return (
            "No verdict: a check above failed, so the arms are not comparable and no lift below may be believed. "
            "Find the cause, then run the experiment again."
        )
    if unlogged := _arm_without_clicks(rows, control, treatment):
        return unlogged
    fewest = min(users, key=lambda arm: users[arm])
    if users[fewest] < FEW_USERS:
        return (
            f"No verdict: {fewest} has {users[fewest]} users, and p values and intervals hold from {FEW_USERS} users "
            "an arm on. `--plan` says how many find an effect."
        )
    deciding = [row for row in rows if row.decides and row.lift is not None and row.adjusted_p is not None]
    if not deciding:
        return "No verdict: there are no clicks to compare."
    better = [row for row in deciding if row.tone == "up"]
    worse = [row for row in deciding if row.tone == "down"]
    if better and worse:
        return (
            f"Mixed: {treatment} is better on {_listed(better)}, worse on {_listed(worse)}. Weigh them before a launch."
        )
    if better:
        note = (
            "This holds at any time of looking."
            if all(row.holds_at_any_time for row in better)
            else "It holds if this is the planned end of the experiment; the always-valid intervals, adjusted for the "
            "number of metrics, do not exclude zero yet."
        )
        return f"{treatment} wins: {_listed(better)}. {note}"
    if worse:
        return f"{treatment} loses: {_listed(worse)}. Keep {control}."
    first, widest = deciding[0], max(deciding, key=lambda row: (row.high or 0) - (row.low or 0))
    least_certain = f" (least certain: {widest.name})" if widest is not first else ""
    return (
        f"No difference found. Lifts between {percent(first.low or 0)} and {percent(first.high or 0)} of {first.name} "
        f"remain possible{least_certain}. `--plan` says how long to run for a smaller effect."
    )


def _arm_without_clicks(rows: list[ReportRow], control: str, treatment: str) -> str:
    """What to say where one arm has no click at all and the other has some, empty otherwise.

    To a control without clicks there is no lift; a treatment without any may be chance, unless its loss is significant.
    """
    row = next((row for row in rows if row.name == PAGE_CTR.name), None)
    if row is None or not (row.control or row.treatment):
        return ""
    if row.control == 0:
        silent, other, found = control, treatment, row.treatment_text
    elif row.treatment == 0 and row.tone == "down":
        silent, other, found = treatment, control, row.control_text
    else:
        return ""
    return f"No verdict: {silent} has no click, while {other} has {found} {row.name}: check {silent}'s click logging."


def _listed(rows: list[ReportRow]) -> str:
    return ", ".join(
        f"{row.name} {percent(row.lift or 0)} (adjusted p {p_text(row.adjusted_p or 0, True)})" for row in rows
    )
