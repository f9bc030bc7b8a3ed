"""Runs beside each other: the sections of the report that take any number of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING

from eval.accuracy import best_layer
from eval.charts import Series, heat_table, line_chart, si, smooth, table

if TYPE_CHECKING:
    from eval.report import Run

BUDGET = "budget.json"  # in the folder of a run that was given a time, by scripts/compare.py
SHARED = "shared.json"  # in the folder of a run that trained beside others, by the same script
SLACK = 0.05  # of that time, until a page says that it was not kept
UNEQUAL = 1.02  # times the parameters of the smallest model, until a page says so
Points = list[tuple[float, float]]
SLOW = 5  # times as long as the median step of its kind: it compiled, or waited for something else
LOSS_NOTE = "Losses in nats per token; minutes are of training steps, without compilation."
SEEDS_NOTE = (
    "Mean (lowest .. highest) over seeds; differences are of runs with the same seed; needles, RULER "
    "and recall are means over all that was asked."
)


def comparison(runs: Sequence[Run], views: Mapping[str, Sequence[Run]]) -> str:
    """The body of a page about several runs; views are groups of them with something in common."""
    names = ", ".join(run.name for run in runs)
    losses = "".join(
        f"<h2>Loss at {escape(title)}</h2><figure>{table(loss_rows(group))}"
        f"<p>{LOSS_NOTE}</p></figure>{_seeds(group)}"
        for title, group in views.items()
    )
    if views and (budgets := budget_rows(runs)):
        notes = "".join(f"<p>{escape(note)}</p>" for note in budget_notes(runs))
        losses += f"<h2>Time budgets</h2>{notes}<figure>{table(budgets)}</figure>"
    said = filter(None, [size_note(runs) if views else "", shared_note(runs)])
    notes = "".join(f"<p>{escape(note)}</p>" for note in said)
    overview = f"<h2>Overview</h2>{notes}<figure>{table(overview_rows(runs))}</figure>"
    return (
        f"<header><h1>Comparison</h1><p>{escape(names)}</p></header>"
        f"{losses}{overview}{_curves(runs, lines_note(views))}{_needles(runs)}{long_context(runs)}"
    )


def lines_note(views: Mapping[str, Sequence[Run]]) -> str:
    """What the lines' styles mean, for more than one group of runs."""
    later = " or ".join(list(views)[1:])
    return (
        f"A colour for each recipe and seed; dashed: runs of the comparison at {later}."
        if later
        else ""
    )


def durations(steps: Sequence[dict]) -> list[float]:
    """Seconds of each training step.

    One that took SLOW times as long as the median step of its sequence length and number of tokens
    counts as that: the first of every sitting compiles kernels, and a run that was interrupted has had
    several. The others differ with the lengths of their documents, which attentions feel differently.
    """
    ends = [step["tokens"] for step in steps]
    sizes = [now - before for before, now in zip([0, *ends], ends, strict=False)]
    kinds = [(step.get("seq_len"), size) for step, size in zip(steps, sizes, strict=True)]
    seconds = [size / step["tokens_per_s"] for step, size in zip(steps, sizes, strict=True)]
    found: dict[tuple, list[float]] = {}
    for kind, taken in zip(kinds, seconds, strict=True):
        found.setdefault(kind, []).append(taken)
    usual = {kind: statistics.median(all_of) for kind, all_of in found.items()}
    return [
        taken if taken < SLOW * usual[kind] else usual[kind]
        for kind, taken in zip(kinds, seconds, strict=True)
    ]


def clock(steps: Sequence[dict]) -> list[float]:
    """Seconds of training behind a run after each of its steps."""
    return list(accumulate(durations(steps)))


def loss_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Last validation losses, and how far each is from the first run's."""
    rows = [("run", "tokens", "minutes", "validation loss", "against the first", "bits per byte")]
    last_of = [run.validation[-1] if run.validation else {} for run in runs]
    first = last_of[0].get("val/loss")
    for run, last in zip(runs, last_of, strict=True):
        loss = last.get("val/loss")
        rows.append((
            run.name,
            _show(last.get("tokens"), "{:,}".format),
            _show(clock(run.training)[-1] if run.training else None, lambda s: f"{s / 60:.1f}"),
            _show(loss, "{:.4f}".format),
            _show(loss and first and loss - first, "{:+.4f}".format),
            _show(last.get("val/bpb"), "{:.4f}".format),
        ))  # fmt: skip
    return rows


def seed_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Mean and range over seeds, a row for each recipe; none unless one has several seeds.

    The difference to the first recipe is of runs with the same seed.
    """
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        seed = run.config.get("seed", 0)
        groups.setdefault(run.name.removesuffix(f"_seed{seed}"), {})[seed] = run
    if all(len(group) < 2 for group in groups.values()):
        return []
    first = next(iter(groups.values()))

    def difference(run: Run) -> float | None:
        losses = _loss(run), _loss(first.get(run.config.get("seed", 0)))
        return None if None in losses else losses[0] - losses[1]

    columns = {
        "validation loss": (_loss, "{:.4f}"),
        "against the first": (difference, "{:+.4f}"),
        "needle generated %": (lambda r: _percent(r.needle, "by_length", "generation"), "{:.1f}"),
        "needle ranked first %": (lambda r: _percent(r.needle, "by_length", "ranking"), "{:.1f}"),
        "RULER %": (lambda r: _percent(r.ruler, "cells", "score"), "{:.1f}"),
        "recall %": (lambda r: _percent(r.recall, "by_distance", "accuracy"), "{:.1f}"),
    }
    rows = [("recipe", "seeds", *columns)]
    for name, group in groups.items():
        cells = (mean_and_range(map(of, group.values()), form) for of, form in columns.values())
        rows.append((name, str(len(group)), *cells))
    kept = [i for i, column in enumerate(zip(*rows[1:], strict=True)) if set(column) != {"–"}]
    return [tuple(row[i] for i in kept) for row in rows]


def mean_and_range(values: Iterable[float | None], form: str) -> str:
    """As in `0.5 (0.4 .. 0.6)`; a dash where there is no number."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    mean, low, high = map(form.format, (statistics.fmean(found), min(found), max(found)))
    return mean if low == high else f"{mean} ({low} .. {high})"


def _loss(run: Run | None) -> float | None:
    return run.validation[-1]["val/loss"] if run and run.validation else None


def _percent(results: dict | None, rows: str, key: str) -> float | None:
    return 100 * statistics.fmean(row[key] for row in results[rows]) if results else None


def _seeds(runs: Sequence[Run]) -> str:
    rows = seed_rows(runs)
    return f"<figure>{table(rows)}<p>{SEEDS_NOTE}</p></figure>" if rows else ""


def budget_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Of runs that were given a time: the speed that made tokens of it, and what came of it."""
    head = ("run", "speed measured in", "tokens/s there", "tokens/s", "minutes given", "minutes")
    rows = [
        (run.name, budget["measured"], f"{budget['tokens_per_s']:,.0f}",
         f"{run.training[-1]['tokens'] / taken:,.0f}", f"{budget['seconds'] / 60:.2f}",
         f"{taken / 60:.2f}")
        for run, budget, taken in _budgets(runs)
    ]  # fmt: skip
    return [head, *rows] if rows else []


def budget_notes(runs: Sequence[Run]) -> list[str]:
    """A sentence for each run that did not take the time that it was given."""
    notes = []
    for run, budget, taken in _budgets(runs):
        off = taken / budget["seconds"] - 1
        if abs(off) > SLACK:
            side = "longer" if off > 0 else "shorter"
            notes.append(
                f"{run.name} trained {abs(off):.0%} {side} than the time it was given: its speed "
                f"was not the one measured in {budget['measured']}, or the time is no whole number "
                "of steps."
            )
    return notes


def shared_note(runs: Sequence[Run]) -> str:
    """That speeds are no measure of runs that trained beside each other; empty without such runs."""
    names = [run.name for run in runs if (run.folder / SHARED).is_file()]
    return (
        f"These trained beside each other, which slowed them: {', '.join(names)}. "
        "Times and tokens/s say nothing of their recipes."
        if names
        else ""
    )


def _budgets(runs: Sequence[Run]) -> list[tuple[Run, dict, float]]:
    """Runs that were given a time, what they were given, and the seconds that they took."""
    return [
        (run, json.loads((run.folder / BUDGET).read_text()), clock(run.training)[-1])
        for run in runs
        if run.training and (run.folder / BUDGET).is_file()
    ]


def overview_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row for each run; a dash where it has no such number."""
    head = ("run", "attention", "parameters", "tokens", "wall-clock hours", "bits per byte",
            "tokens/s", "MFU", "memory (GB)")  # fmt: skip
    rows = [head]
    for run in runs:
        steps = run.training
        last = steps[-1] if steps else {}
        bpb = run.validation[-1].get("val/bpb") if run.validation else None
        seconds = durations(steps)
        speed = last["tokens"] / sum(seconds) if steps else None
        mfu = None
        if steps and all("mfu" in m for m in steps):
            mfu = statistics.fmean((m["mfu"] for m in steps), weights=seconds)
        memory = max((m["memory_gb"] for m in steps if "memory_gb" in m), default=None)
        attention = str(run.config.get("attention", {}).get("_target_", "")).rpartition(".")[2]
        rows.append((
            run.name,
            attention or "–",
            _show(run.num_parameters, lambda n: si(float(f"{n:.3g}"))),
            _show(last.get("tokens"), "{:,}".format),
            _show(last.get("time"), lambda seconds: f"{seconds / 3600:.2f}"),
            _show(bpb, "{:.4f}".format),
            _show(speed, "{:,.0f}".format),
            _show(mfu, "{:.1%}".format),
            _show(memory, "{:.1f}".format),
        ))  # fmt: skip
    return rows


def size_note(runs: Sequence[Run]) -> str:
    """A sentence where models that are compared are not of one size, else nothing."""
    sizes = {run.name: run.num_parameters for run in runs if run.num_parameters}
    if not sizes or max(sizes.values()) <= UNEQUAL * min(sizes.values()):
        return ""
    least, most = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
    return (
        f"These models are not of one size: {least} has {sizes[least]:,} parameters, {most} "
        f"{sizes[most]:,}. An override of all recipes leaves what a recipe sets itself, such as "
        "model.ffn_dim, as it is."
    )


def _show(value: float | None, form: Callable[[float], str]) -> str:
    return "–" if value is None else form(value)


def _curves(runs: Sequence[Run], note: str) -> str:
    def of(x: str, y: str, side: str = "training") -> list[Points]:
        return [[(m[x], m[y]) for m in getattr(run, side) if m.get(y) is not None] for run in runs]

    smoothed = [smooth(points) for points in of("tokens", "loss")]
    seconds = [dict(zip((m["tokens"] for m in run.training), clock(run.training), strict=True))
               for run in runs]  # fmt: skip
    longest = max(max(at.values(), default=0) for at in seconds)
    unit, length = ("hours", 3600) if longest > 7200 else ("minutes", 60)

    def by_time(curves: list[Points]) -> list[Points]:
        return [[(at[t] / length, y) for t, y in points if t in at]
                for at, points in zip(seconds, curves, strict=True)]  # fmt: skip

    held_out = of("tokens", "val/bpb", "validation")
    charts = [
        _chart("Training loss (nats per token)", runs, smoothed),
        _chart("Training loss against time", runs, by_time(smoothed), x_name=f"{unit} of training"),
        _chart("Bits per byte of held-out text", runs, held_out),
        _chart("Bits per byte against time", runs, by_time(held_out), x_name=f"{unit} of training"),
        _chart("Tokens per second", runs, [smooth(p) for p in of("tokens", "tokens_per_s")]),
        _chart("Memory at its peak (GB)", runs, of("tokens", "memory_gb")),
    ]
    note = f'<p class="quiet">{escape(note)}</p>' if note else ""
    return f'<h2>Training</h2>{note}<div class="grid two">{"".join(charts)}</div>'


def _chart(title: str, runs: Sequence[Run], points: Sequence[Points], **options) -> str:
    """One line for each run."""
    series = [Series(run.name, own, run.style) for run, own in zip(runs, points, strict=True)]
    return line_chart(title, series, **options)


def _needles(runs: Sequence[Run]) -> str:
    """For each task and score a heatmap of each run, side by side, and the means by length."""
    measured = [run for run in runs if run.needle]
    if not measured:
        return ""
    tasks = {task: None for run in measured for task in run.needle["chance"]}
    parts = []
    for task in tasks:
        having = [run for run in measured if task in run.needle["chance"]]
        for score, what in (("generation", "answer generated"), ("ranking", "answer ranked first")):
            title = f"{task.replace('_', '-')}: {what}"
            means = [
                [
                    (r["length"], 100 * r[score])
                    for r in run.needle["by_length"]
                    if r["task"] == task
                ]
                for run in having
            ]
            grids = ""
            for run in having:
                cells = [cell for cell in run.needle["cells"] if cell["task"] == task]
                chance = f", chance {100 * run.needle['chance'][task]:.3g} %"
                grids += heat_table(f"{run.name}{chance * (score == 'ranking')}", cells, score)
            options = {"x_name": "context length in tokens", "powers": True, "percent": True}
            parts.append(
                f'<h3>{title}</h3><div class="grid two">{grids}'
                f"{_chart('Accuracy in %, mean over depths', having, means, **options)}</div>"
            )
    return f"<h2>Needle in a haystack</h2>{''.join(parts)}"


def long_context(runs: Sequence[Run]) -> str:
    """RULER, loss by position and by context, recall by distance; what no run has is left out."""
    return _ruler(runs) + _position(runs) + _recall(runs)


def ruler_rows(having: Sequence[Run], named: bool) -> list[tuple[str, ...]]:
    """A row for each run and length, a column for each task and their mean, in %. Not named, of one
    run, with rows and columns exchanged: all 13 tasks fit on a page."""
    tasks = list(dict.fromkeys(cell["task"] for run in having for cell in run.ruler["cells"]))
    rows = [("run", "length", *tasks, "mean")]
    for run in having:
        at: dict[int, dict[str, float]] = {}
        for cell in run.ruler["cells"]:
            at.setdefault(cell["length"], {})[cell["task"]] = 100 * cell["score"]
        for length, scores in at.items():
            shown = [*map(scores.get, tasks), statistics.fmean(scores.values())]
            rows.append((run.name, f"{length:,}", *(_show(x, "{:.1f}".format) for x in shown)))
    return rows if named else list(zip(*(row[1:] for row in rows), strict=True))


def _ruler(runs: Sequence[Run]) -> str:
    having = [run for run in runs if run.ruler]
    if not having:
        return ""
    samples = ", ".join(dict.fromkeys(f"{run.ruler['cells'][0]['samples']:,}" for run in having))
    return (
        f'<h2>RULER</h2><p class="quiet">Share of the expected strings in the answer, in %; {samples} '
        f"samples a task and length.</p><figure>{table(ruler_rows(having, len(runs) > 1))}</figure>"
    )


def _position(runs: Sequence[Run]) -> str:
    having = [run for run in runs if run.position]
    if not having:
        return ""
    curves = []
    for key, title, x_name in (
        ("position", "Loss by position (nats per token)", "position in the window, from"),
        ("context", "Loss of the same tokens by context (nats per token)", "tokens of context"),
    ):
        points = [[(r[key], r["loss"]) for r in run.position[f"by_{key}"]] for run in having]
        curves.append(_chart(title, having, points, x_name=x_name, powers=True))
    return f'<h2>Loss by position</h2><div class="grid two">{"".join(curves)}</div>'


def _recall(runs: Sequence[Run]) -> str:
    having = [run for run in runs if run.recall]
    if not having:
        return ""
    points = [
        [(r["distance"], 100 * r["accuracy"]) for r in run.recall["by_distance"]] for run in having
    ]
    x_name = "distance in tokens, from"
    charts = _chart("Accuracy in %", having, points, x_name=x_name, powers=True, percent=True)
    sparse = [run for run in having if "selected/chance" in run.recall["by_distance"][0]]
    if sparse:
        title = "Heads that select the true block, in %, in the layer where most do"
        series = []
        for run in sparse:
            rows = run.recall["by_distance"]
            shares = [(r["distance"], 100 * best_layer(r)) for r in rows]
            drawn = [(r["distance"], 100 * r["selected/chance"]) for r in rows]
            series.append(Series(run.name, shares, run.style))
            series.append(Series("by chance", drawn, f"{run.style} faint"))
        charts += line_chart(title, series, x_name=x_name, powers=True, percent=True)
    return f'<h2>Associative recall by distance</h2><div class="grid two">{charts}</div>'
