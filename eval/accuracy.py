"""From right and wrong answers to accuracies with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence

SCORES = ("generation", "ranking")


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927), 95 % by default; holds at 0 and at n.

    Of n shares between 0 and 1 (several answers asked for at once) `successes` is their sum: they
    vary less than rights and wrongs of the same mean, so the interval is a little wide for them.
    """
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(max(0.0, p * (1 - p) / n) + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarize(records: list[dict], *keys: str, scores: Sequence[str] = SCORES) -> list[dict]:
    """A row for each combination of keys (such as "length", "depth"), in order of appearance.

    A record holds under each score the share of its answers that is right (of one answer: true or
    false); a row holds the mean, and the interval's ends under <score>_low and <score>_high. What
    records hold under selected/… (model/probe.py) is averaged.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    rows = []
    for group, members in groups.items():
        row = dict(zip(keys, group, strict=True)) | {"samples": len(members)}
        for score in scores:
            right = sum(member[score] for member in members)
            low, high = wilson(right, len(members))
            row |= {score: round(right / len(members), 4)}
            row |= {f"{score}_low": round(low, 4), f"{score}_high": round(high, 4)}
        for key in (k for k in members[0] if k.startswith("selected/")):
            row[key] = round(sum(member[key] for member in members) / len(members), 4)
        rows.append(row)
    return rows


def best_layer(row: dict) -> float:
    """Of the layers, the highest share of heads that select the true block."""
    return max(share for key, share in row.items() if key.startswith("selected/layer_"))


def show(rows: list[dict], key: str, form: str = "{:,}") -> list[str]:
    """Lines for a terminal: the key, the number of samples, and each score with its interval."""
    lines = []
    for row in rows:
        cells = [
            f"{row[s]:>5.0%} [{row[s + '_low']:>4.0%} –{row[s + '_high']:>5.0%}]" for s in SCORES
        ]
        lines.append(f"{form.format(row[key]):>8}  {row['samples']:>7}  " + "   ".join(cells))
    return lines
