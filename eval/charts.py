"""Pictures for a page: line charts as inline SVG, accuracy grids as HTML tables. No scripts.

Colours are CSS classes (report.css), so that a chart follows the page into the dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import accumulate
from typing import NamedTuple

WIDTH, HEIGHT = 480, 260  # small enough to stay legible on a phone
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 10, 40
CIVIDIS = (
    (0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (253, 231, 55),
)  # fmt: skip


class Series(NamedTuple):
    """One line of a chart. style is its CSS class: line, faint, second, third, fourth (few points
    of these three are dotted) or rule (a level)."""

    name: str
    points: list[tuple[float, float]]
    style: str = "line"


def line_chart(
    title: str, series: Sequence[Series], log: bool = False, x_name: str = "tokens",
    powers: bool = False, percent: bool = False,
) -> str:  # fmt: skip
    """A figure of series over tokens, or over x_name. Styles may also be run0 to run7.

    log makes the vertical axis logarithmic; powers the horizontal one, with ticks at powers of two;
    percent has the vertical one go from 0 to 100.
    Values that can't be drawn (not finite, or not positive on a log axis) are left out and counted
    in the caption. Returns an empty string if nothing remains.
    """
    drawn, dropped = [], 0
    for one in series:
        points = [p for p in one.points if math.isfinite(p[1]) and (p[1] > 0 or not log)]
        dropped += len(one.points) - len(points)
        if points:
            drawn.append(one._replace(points=thin(points)))
    if not drawn:
        return ""
    xs, ys = zip(*(p for one in drawn for p in one.points), strict=True)
    x_ticks = power_ticks(min(xs), max(xs)) if powers else ticks(0, max(xs))
    x_low, x_high = x_ticks[0], max(max(xs), x_ticks[-1])
    x_scale = math.log if powers else float
    if percent:
        y_ticks = ticks(0, 100)
    else:
        y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    low, high = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])
    scale = math.log if log else float

    def x(value: float) -> float:
        share = (x_scale(value) - x_scale(x_low)) / ((x_scale(x_high) - x_scale(x_low)) or 1)
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def y(value: float) -> float:
        share = (scale(value) - scale(low)) / ((scale(high) - scale(low)) or 1)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    svg = []
    for tick, shown in zip(y_ticks, labels(y_ticks), strict=True):
        svg.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        svg.append(f'<text class="end" x="{LEFT - 7}" y="{y(tick) + 4:.1f}">{shown}</text>')
    label = "{:,}".format if powers else si
    for tick in x_ticks:
        svg.append(f'<text class="middle" x="{x(tick):.1f}" y="{HEIGHT - 21}">{label(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    svg.append(f'<text class="middle" x="{middle}" y="{HEIGHT - 3}">{escape(x_name)}</text>')
    for one in drawn:
        if one.style == "rule":
            path = f"M{LEFT} {y(one.points[0][1]):.1f}H{WIDTH - RIGHT}"
        else:
            path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in one.points)
        svg.append(f'<path class="{one.style}" d="{path}"/>')
        alone = len(one.points) == 1 and one.style != "rule"
        dotted = one.style in ("second", "third", "fourth")
        if alone or (dotted and len(one.points) <= 40):
            svg += (
                f'<circle class="{one.style}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>'
                for a, b in one.points
            )
    legend = "".join(f'<span class="{s.style}">{escape(s.name)}</span>' for s in drawn if s.name)
    note = f"<p>Left out, not finite or not positive: {dropped:,}</p>" if dropped else ""
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(svg)}</svg>{note}</figure>"
    )


def thin(points: list[tuple[float, float]], most: int = 600) -> list[tuple[float, float]]:
    """At most about `most` points: of each stretch the lowest and the highest, so spikes stay."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Moving average over about a fiftieth of the points: centred, narrower at the start, where
    losses fall steeply, and one-sided at the end."""
    points = [p for p in points if math.isfinite(p[1])]
    sums, n, widest = [0.0, *accumulate(y for _, y in points)], len(points), len(points) // 100
    result = []
    for i, (x, _) in enumerate(points):
        low, high = i - min(i, widest), min(i + min(i, widest) + 1, n)
        result.append((x, (sums[high] - sums[low]) / (high - low)))
    return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that span low to high; all but the ends lie within."""
    if high <= low:
        low, high = low - abs(low) / 2, high + abs(high) / 2 or 1.0
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = unit * next(m for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from below low to above high; within one decade 1, 2, 5 times them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    below = max(t for t in fine if t <= low * 1.0001)
    above = min((t for t in fine if t >= high * 0.9999), default=10.0**last)
    chosen = [t for t in fine if below <= t <= above]
    if len(chosen) > 7:
        chosen = [10.0**e for e in range(first, last + 1)]
    return chosen if len(chosen) > 1 else [below, 10 * below]


def power_ticks(low: float, high: float) -> list[int]:
    """Powers of two from at or below low to at or above high; of many every second, third, …"""
    first, last = math.floor(math.log2(low) + 1e-9), math.ceil(math.log2(high) - 1e-9)
    step = -(-(last - first) // 6) or 1
    return [2**i for i in range(first, max(last, first + 1) + step, step)]


def labels(values: Sequence[float]) -> list[str]:
    """si of each, with as many digits as tell them apart."""
    for digits in range(3, 9):
        shown = [si(value, digits) for value in values]
        if len(set(shown)) == len(set(values)):
            break
    return shown


def si(value: float, digits: int = 3) -> str:
    """1500000 -> 1.5M; small numbers as they are."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.{digits + 1}g}{unit}"
    return f"{value:.{digits}g}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head."""
    head, *body = (
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    )
    lines = "".join(f"<tr>{row}</tr>" for row in (head, *body))
    return f'<div class="scroll"><table>{lines}</table></div>'


def heat_table(title: str, cells: list[dict], score: str) -> str:
    """Accuracy by depth (rows) and length (columns), coloured by cividis as in the PNG."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    at = {(cell["length"], cell["depth"]): cell[score] for cell in cells}
    head = "".join(f"<th>{n:,}</th>" for n in lengths)
    rows = []
    for depth in depths:
        row = "".join(_heat_cell(at.get((length, depth))) for length in lengths)
        rows.append(f"<tr><th>{depth:g} %</th>{row}</tr>")
    return (
        f"<figure><figcaption><b>{escape(title)}</b></figcaption>"
        f'<div class="scroll"><table class="heat"><tr><th>depth</th>{head}</tr>{"".join(rows)}'
        "</table></div><p>Columns: context length in tokens. Numbers: accuracy in %.</p></figure>"
    )


def _heat_cell(value: float | None) -> str:
    if value is None:
        return "<td></td>"
    place = min(value, 1) * (len(CIVIDIS) - 1)
    i = min(int(place), len(CIVIDIS) - 2)
    ends = zip(CIVIDIS[i], CIVIDIS[i + 1], strict=True)
    colour = (round(a + (b - a) * (place - i)) for a, b in ends)
    text = "#fff" if value < 0.5 else "#000"
    return f'<td style="background:rgb{tuple(colour)};color:{text}">{100 * value:.0f}</td>'
