"""docs/results/loop.md, written from the rounds that are finished."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from ranking.files import write_text
from ranking.significance import paired_bootstrap
from training.world.drift import DriftSettings

WIDTH = 120
KINDS = ("new", "moved", "unchanged")
SIGNIFICANT = 0.05  # of page CTR on one day, without any correction: the earliest that anybody could call it a drop


def write_report(
    found: list[dict[str, Any]], rounds: int, drift: DriftSettings, report: Path | None, note: str, command: str
) -> str:
    """The page in Markdown; with `report`, also loop.md there. found: Seed.found() of all seeds."""
    seeds = sorted({one["seed"] for one in found})
    page = f"""# The loop on a world whose taste drifts

<!-- made by
run: {command}
-->
<!-- end of what it made -->

Every figure below is written by `{command}`.

Two students serve half of the users each, on the same days: `frozen` is the one of the first day, `loop` the one that
`demo.retrain` made of the rounds before. In rounds {drift.first_round} to {drift.last_round} the taste drifts:
{drift.new_intents:.0%} of all heads are searched for the first time, and {drift.moved_meanings:.0%} exchange the words
that searchers type for them. Within a round the share of pages that follow the new taste grows from day to day.
NDCG@5 (linear gain) is measured on queries of the round's taste that nobody typed.
{_plural(len(seeds), "seed")}: a world and a training each.

{_ndcg_table(found)}

{_conclusion(found, rounds)}

Difference (loop less frozen) by what drift made of a query:

{_kind_table(found)}

## The watch

{_watch_table(found)}

{_watch_conclusion(found, drift)}

## What was retrained on

{_clicks_table(found)}

## What is simulated
The users, the clock of the log, and the model server: the router's own code assigns, ranks and logs, and asks a table
of the checkpoints' own scores instead of Triton. Real programs with real files: `ab_compact`, `ab_watch`'s checks, and
of `demo.retrain` everything up to the new student (`prepare_clicks` with the privacy gate, the candidates, the teacher,
its labels folder, `distill_student`). The teacher's labels are computed in process and written by `import_labels`. Left
out: engine, gate on the engine, replay and ramp of the A/B test, so every new student serves.

{note}
"""
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        write_text(report / "loop.md", page)
    return page


def _plural(count: int, name: str) -> str:
    return f"{count} {name}" + ("s" if count != 1 else "")


def _rounds(found: list[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    numbers = sorted({one["round"] for one in found})
    return [(number, [one for one in found if one["round"] == number]) for number in numbers]


def _values(of_round: list[dict[str, Any]], model: str, kind: str | None = None) -> np.ndarray:
    return np.array(
        [
            value
            for one in of_round
            for value, its_kind in zip(one["test"][model], one["test"]["kinds"])
            if kind in (None, its_kind)
        ]
    )


def _difference(of_round: list[dict[str, Any]], kind: str | None = None) -> tuple[str, float]:
    """The difference with its 95% interval over queries, as text, and the interval's lower end."""
    ours, theirs = (_values(of_round, model, kind) for model in ("loop", "frozen"))
    if len(ours) < 2:
        return "", 0.0
    gap = paired_bootstrap(ours, theirs)
    return f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})", gap.low


def _ndcg_table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| round | seeds | queries | frozen | loop | difference, 95% interval over queries |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for number, of_round in _rounds(found):
        frozen, loop = (_values(of_round, model) for model in ("frozen", "loop"))
        lines.append(
            f"| {number} | {len(of_round)} | {len(frozen)} | {frozen.mean():.3f} | {loop.mean():.3f} "
            f"| {_difference(of_round)[0]} |"
        )
    return "\n".join(lines)


def _kind_table(found: list[dict[str, Any]]) -> str:
    lines = ["| round | " + " | ".join(KINDS) + " |", "|--:|" + "--:|" * len(KINDS)]
    for number, of_round in _rounds(found):
        lines.append(f"| {number} | " + " | ".join(_difference(of_round, kind)[0] for kind in KINDS) + " |")
    return "\n".join(lines)


def _conclusion(found: list[dict[str, Any]], rounds: int) -> str:
    number, last = _rounds(found)[-1]
    text, low = _difference(last)
    if number < rounds:
        return f"Not finished: {number} of {rounds} rounds."
    verdict = "beats" if low > 0 else "does not beat"
    return f"**By round {number} the loop {verdict} the frozen student**: {text}."


def _drop(day: dict[str, Any]) -> list[str]:
    """The arms whose page CTR of the day is lower than before the drift, told from chance."""
    return [arm for arm, one in day["ctr"].items() if one["ctr"] < one["quiet"] and one["p"] < SIGNIFICANT]


def _alerts(day: dict[str, Any]) -> list[dict[str, Any]]:
    """The day's alerts, without latency: that is the simulation's own, on a machine that did other work."""
    return [alert for alert in day["alerts"] if alert["check"] != "latency"]


def _early_alerts(day: dict[str, Any]) -> list[dict[str, Any]]:
    """The day's alerts but those on clicks themselves."""
    return [alert for alert in _alerts(day) if alert["check"] != "click_rate"]


def _watch_table(found: list[dict[str, Any]]) -> str:
    lines = ["| seed | round | day | alerts | page CTR frozen | loop | lower than before the drift (p < 0.05) |"]
    lines += ["|--:|--:|---|---|--:|--:|---|"]
    for one in found:
        for day in one["days"]:
            names: dict[str, None] = {}
            for alert in _alerts(day):
                names.setdefault(" ".join([alert["check"], *filter(None, [alert["where"].get("model")])]))
            ctr = [f"{day['ctr'][arm]['ctr']:.1%}" if day["ctr"] else "" for arm in ("frozen", "loop")]
            cells = [one["seed"], one["round"], day["day"], ", ".join(names), *ctr, ", ".join(_drop(day))]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _watch_conclusion(found: list[dict[str, Any]], drift: DriftSettings) -> str:
    lines = []
    for seed in sorted({one["seed"] for one in found}):
        of_seed = [one for one in found if one["seed"] == seed]
        quiet = [day for one in of_seed if one["round"] < drift.first_round for day in one["days"]]
        days = [day for one in of_seed if one["round"] >= drift.first_round for day in one["days"]]
        fired = next((day["day"] for day in days if _early_alerts(day)), None)
        dropped = next((day["day"] for day in days if _drop(day)), None)
        false_alarms = (
            f"Days with an alert before any drift: {sum(bool(_alerts(day)) for day in quiet)} of {len(quiet)}."
        )
        if not days:
            lines.append(f"- Seed {seed}: no round with drift is finished. {false_alarms}")
            continue
        alert = "did not fire on the drift" if fired is None else f"fired on the drift first on {fired}"
        drop = "was not lower on any day" if dropped is None else f"was lower first on {dropped}"
        early = fired is not None and (dropped is None or fired < dropped)
        lines.append(
            f"- Seed {seed}: the watch {alert} (alerts on clicks and latency left out), page CTR of an arm {drop}: "
            f"**{'before' if early else 'not before'} the drop**. {false_alarms}"
        )
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)


def _clicks_table(found: list[dict[str, Any]]) -> str:
    lines = ["| seed | round | events | queries | of too few users | click pairs | stopped at |"]
    lines += ["|--:|--:|--:|--:|--:|--:|---|"]
    for one in found:
        if one["clicks"]:
            of = one["clicks"]
            cells = [one["seed"], one["round"], f"{of['events_read']:,}", of["normalised_queries"]]
            cells += [of["privacy"]["rare_queries"], f"{of['clicks']:,}", one["refused"]]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
