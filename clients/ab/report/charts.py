"""The report's pictures as inline SVG: no script, no outside resource, readable at 400 pixels and in print."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH = 640
_GRID, _INK, _MUTED = "#e3e6ea", "#1d2733", "#66717d"
CONTROL_COLOUR, TREATMENT_COLOUR = "#7a8594", "#1f6feb"


def percent(value: float) -> str:
    """A relative change, given as a fraction, with its sign and two decimals."""
    return f"{value * 100:+.2f}%"


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    raw = (high - low) / max(count, 1) or 1.0
    magnitude = 10 ** np.floor(np.log10(raw))
    step = next(s * magnitude for s in (1, 2, 2.5, 5, 10) if s * magnitude >= raw)
    positions = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    return [float(t) for t in positions + 0.0]  # adding zero turns -0 into 0


def _short(value: float) -> str:
    return f"{value * 100:+.3g}%" if value else "0%"


def _svg(height: int, body: list[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}" '
        f'font-family="system-ui, sans-serif" font-size="13">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, words: str, anchor: str = "start", colour: str = _INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, extra: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}" {extra}/>'


def forest(rows: Sequence[tuple[str, float, float, float]], label: str) -> str:
    """Relative lifts with intervals, one line each: rows of (name, lift, low, high), as fractions."""
    left, right, top, step = 190, WIDTH - 90, 14, 30
    low = min(0.0, *(row[2] for row in rows))
    high = max(0.0, *(row[3] for row in rows))
    pad = (high - low) * 0.06 or 0.01
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    height = top + step * len(rows) + 30
    body = []
    for tick in _ticks(low, high):
        body.append(_line(x(tick), top, x(tick), height - 30, _GRID))
        body.append(_text(x(tick), height - 12, _short(tick), "middle", _MUTED))
    body.append(_line(x(0), top, x(0), height - 30, _MUTED, 1.5))
    for i, (name, lift, row_low, row_high) in enumerate(rows):
        y = top + step * (i + 0.5)
        body.append(_text(0, y + 4, name))
        body.append(_line(x(row_low), y, x(row_high), y, TREATMENT_COLOUR, 3))
        body.append(f'<circle cx="{x(lift):.1f}" cy="{y:.1f}" r="5" fill="{TREATMENT_COLOUR}"/>')
        body.append(_text(WIDTH, y + 4, percent(lift), "end"))
    return _svg(int(height), body, label)


def _axes(x, y, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], box) -> list[str]:
    left, right, _, bottom = box
    body = []
    for value, words in y_ticks:
        body.append(_line(left, y(value), right, y(value), _GRID))
        body.append(_text(left - 8, y(value) + 4, words, "end", _MUTED))
    for value, words in x_ticks:
        body.append(_text(x(value), bottom + 20, words, "middle", _MUTED))
    return body


def cumulative(labels: Sequence[str], lift: np.ndarray, low: np.ndarray, high: np.ndarray, label: str) -> str:
    """Lift so far against time with its confidence sequence: each array float [times], as fractions."""
    box = left, right, top, bottom = 64, WIDTH - 12, 12, 230
    # the first looks are wide beyond reading: the frame shows the last two thirds in full and cuts the rest
    shown = slice(len(lift) // 3, None)
    floor, ceiling = min(0.0, low[shown].min()), max(0.0, high[shown].max())
    pad = (ceiling - floor) * 0.08 or 0.01
    floor, ceiling = floor - pad, ceiling + pad

    def x(i: float) -> float:
        return left + (i / max(len(lift) - 1, 1)) * (right - left)

    def y(value: float) -> float:
        return bottom - (float(np.clip(value, floor, ceiling)) - floor) / (ceiling - floor) * (bottom - top)

    picks = sorted({0, len(labels) // 2, len(labels) - 1})
    body = _axes(x, y, [(i, labels[i][5:16]) for i in picks], [(t, _short(t)) for t in _ticks(floor, ceiling)], box)
    # end labels would hang over the frame when centred
    band = [f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(high)] + [
        f"{x(i):.1f},{y(low[i]):.1f}" for i in range(len(low) - 1, -1, -1)
    ]
    body.append(f'<polygon points="{" ".join(band)}" fill="{TREATMENT_COLOUR}" opacity="0.18"/>')
    points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(lift))
    body.append(f'<polyline points="{points}" fill="none" stroke="{TREATMENT_COLOUR}" stroke-width="2.5"/>')
    body.append(_line(left, y(0), right, y(0), _MUTED, 1.5, 'stroke-dasharray="5 4"'))
    return _svg(
        bottom + 30, [part.replace('text-anchor="middle"', _end_anchor(part, left, right)) for part in body], label
    )


def _end_anchor(part: str, left: float, right: float) -> str:
    if not part.startswith("<text"):
        return 'text-anchor="middle"'
    position = float(part.split('x="')[1].split('"')[0])
    side = "start" if position <= left + 1 else "end" if position >= right - 1 else "middle"
    return f'text-anchor="{side}"'


def ecdf(arms: Sequence[tuple[str, np.ndarray]], label: str) -> str:
    """Share of answers within a time, logarithmic milliseconds: arms of (name, float [requests]), control first."""
    box = left, right, top, bottom = 64, WIDTH - 12, 30, 230
    levels = np.concatenate([np.linspace(0, 0.99, 100), [0.995, 0.999, 1.0]])
    curves = [(name, np.maximum(np.quantile(values, levels), 1e-2)) for name, values in arms]
    low = np.log10(min(curve[0] for _, curve in curves))
    high = max(np.log10(max(curve[-1] for _, curve in curves)), low + 0.3)

    def x(milliseconds: float) -> float:
        return left + (np.log10(milliseconds) - low) / (high - low) * (right - left)

    def y(share: float) -> float:
        return bottom - share * (bottom - top)

    grid = [10.0**power * step for power in range(-2, 7) for step in (1, 2, 5)]
    inside = [g for g in grid if low <= np.log10(g) <= high]
    inside = inside[:: max(1, len(inside) // 6)]
    body = _axes(x, y, [(g, f"{g:g} ms") for g in inside], [(s, f"{s:.0%}") for s in (0, 0.25, 0.5, 0.75, 1)], box)
    for i, (name, curve) in enumerate(curves):
        colour = (CONTROL_COLOUR, TREATMENT_COLOUR)[i]
        points = " ".join(f"{x(v):.1f},{y(s):.1f}" for v, s in zip(curve, levels))
        body.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        body.append(_line(left + 160 * i, 12, left + 24 + 160 * i, 12, colour, 4))
        body.append(_text(left + 32 + 160 * i, 16, name))
    return _svg(bottom + 30, body, label)
