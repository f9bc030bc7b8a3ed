"""A comparison as Markdown with figures that are small enough to be kept beside a README."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from eval.accuracy import best_layer
from eval.compare import (
    LOSS_NOTE,
    SEEDS_NOTE,
    budget_notes,
    budget_rows,
    clock,
    lines_note,
    loss_rows,
    overview_rows,
    ruler_rows,
    seed_rows,
    shared_note,
    size_note,
)
from eval.heatmap import save_heatmaps
from eval.report import Run, load_views

Rows = Sequence[Sequence[str]]
CSS = Path(__file__).with_name("report.css").read_text()
COLOURS = dict(re.findall(r"--(run\d): (#\w+)", CSS)[:8])  # of the page's light side


def write_results(views: Mapping[str, Sequence[Path]], folder: Path, command: str) -> Path:
    """Write <folder>/results.md and the pictures in <folder>/figures; returns the first's path.

    views: run folders by what they have in common, such as "equal tokens"; the first of each is what
    the others are compared with. command is the one that made them.
    """
    folders = list(dict.fromkeys(f for group in views.values() for f in group))
    runs, groups = load_views(folders, views)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    parts = ["# Comparison", _setting(runs), f"    {command}"]
    for title, group in groups.items():
        parts += [f"## Loss at {title}", markdown(loss_rows(group))]
        if rows := seed_rows(group):
            parts += [SEEDS_NOTE, markdown(rows)]
    parts.append(_picture("Validation loss", _save_losses(runs, figures / "loss.png")))
    parts += filter(None, [lines_note(groups)])
    if rows := budget_rows(runs):
        parts += ["## Time budgets", *budget_notes(runs), markdown(rows)]
    parts += [
        "## Speed and memory",
        *filter(None, [size_note(runs), shared_note(runs)]),
        markdown(overview_rows(runs)),
    ]
    for title, group in groups.items():
        having = {run.name: run.needle for run in group if run.needle}
        if having:
            path = figures / f"needle_{title.replace(' ', '_')}.png"
            save_heatmaps(having, path)
            parts += [f"## Needle in a haystack, {title}", _picture(f"Needle, {title}", path)]
            parts.append(
                "Mean over depths, in %. Ranked first: the right value is the likeliest one."
            )
            parts.append(markdown(needle_rows([run for run in group if run.needle])))
    if having := [run for run in runs if run.ruler]:
        parts += ["## RULER", "Share of the expected strings in the answer, in %."]
        parts.append(markdown(ruler_rows(having, named=True)))
    if having := [run for run in runs if run.position]:
        path = _save_positions(having, figures / "position.png")
        parts += ["## Loss by position", _picture("Loss by position and by context", path)]
        parts.append("Nats per token, by position from, and of the same tokens by their context.")
        parts += (markdown(position_rows(having, key)) for key in ("position", "context"))
    if having := [run for run in runs if run.recall]:
        parts += ["## Associative recall by distance", "Accuracy in %, by distance from."]
        parts.append(markdown(recall_rows(having, lambda row: row["accuracy"])))
        if sparse := [r for r in having if "selected/chance" in r.recall["by_distance"][0]]:
            parts.append(
                "Heads that select the true block, in %, in the layer where most do; in brackets, "
                "of as many blocks drawn at random."
            )
            parts.append(markdown(recall_rows(sparse, best_layer, lambda r: r["selected/chance"])))
    path = folder / "results.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _setting(runs: Sequence[Run]) -> str:
    """Machines, versions and commits, several where the runs differ; data and lengths of the first."""
    names = ("device", "torch", "triton", "deepspeed", "commit")
    found = {name: [str(run.environment.get(name) or "unknown") for run in runs] for name in names}
    facts = [f"{name}: {' / '.join(dict.fromkeys(values))}" for name, values in found.items()]
    data = runs[0].data
    weights = data.get("weights", {})
    shares = ", ".join(f"{name} {w / sum(weights.values()):.0%}" for name, w in weights.items())
    facts.append(f"data: {data.get('name', 'unknown')}{f' ({shares})' if shares else ''}")
    facts.append(f"sequences: {runs[0].lengths} tokens")
    return "; ".join(facts) + f". {LOSS_NOTE}"


def needle_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Mean over depths, in %: a row for each run, task and score, a column for each length."""
    lengths = sorted({row["length"] for run in runs for row in run.needle["by_length"]})
    rows = [("run", "task", "answer", *(f"{n:,}" for n in lengths))]
    for run in runs:
        for task in run.needle["chance"]:
            at = {r["length"]: r for r in run.needle["by_length"] if r["task"] == task}
            for score, what in (("generation", "generated"), ("ranking", "ranked first")):
                shares = [f"{100 * at[n][score]:.1f}" if n in at else "–" for n in lengths]
                rows.append((run.name, task.replace("_", "-"), what, *shares))
    return rows


def position_rows(runs: Sequence[Run], key: str) -> Rows:
    """Losses in nats by "position" or "context"."""
    curves = [{row[key]: f"{row['loss']:.3f}" for row in r.position[f"by_{key}"]} for r in runs]
    return _by_tokens(runs, key, curves)


def recall_rows(runs: Sequence[Run], *shares: Callable[[dict], float]) -> Rows:
    """A share of each row of the recall's results in %, and another in brackets."""
    form = "{:.1f} ({:.1f})" if len(shares) == 2 else "{:.1f}"
    curves = [
        {
            row["distance"]: form.format(*(100 * share(row) for share in shares))
            for row in run.recall["by_distance"]
        }
        for run in runs
    ]
    return _by_tokens(runs, "distance", curves)


def _by_tokens(runs: Sequence[Run], name: str, curves: Sequence[Mapping[int, str]]) -> Rows:
    """A row for each number of tokens, a column for each run."""
    body = [(f"{n:,}", *(at.get(n, "–") for at in curves)) for n in sorted(set().union(*curves))]
    return [(f"{name} (tokens)", *(run.name for run in runs)), *body]


def markdown(rows: Rows) -> str:
    """The first row is the head, the first column the rows' names."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def _picture(title: str, path: Path) -> str:
    return f"![{title}]({path.parent.name}/{path.name})"


def _save_losses(runs: Sequence[Run], path: Path) -> Path:
    """Validation loss against tokens and against time."""
    curves = []
    for run in runs:
        seconds = clock(run.training)
        at = {m["tokens"]: s / 60 for m, s in zip(run.training, seconds, strict=True)}
        points = [(m["tokens"] / 1e6, at.get(m["tokens"]), m["val/loss"]) for m in run.validation]
        curves.append([p for p in points if p[1] is not None])
    panels = {"million tokens": 0, "minutes of training": 1}
    lines = {x: [[(p[i], p[2]) for p in points] for points in curves] for x, i in panels.items()}
    return _save_lines(runs, lines, "validation loss (nats per token)", path)


def _save_positions(runs: Sequence[Run], path: Path) -> Path:
    lines = {
        title: [[(r[key], r["loss"]) for r in run.position[f"by_{key}"]] for run in runs]
        for key, title in (("position", "position in the window, from"),
                           ("context", "tokens of context before the window's last"))
    }  # fmt: skip
    return _save_lines(runs, lines, "loss (nats per token)", path, log=True)


def _save_lines(
    runs: Sequence[Run], panels: Mapping[str, list], y: str, path: Path, log: bool = False
) -> Path:
    """A panel for each x axis, with a line of (x, y) points for each run."""
    figure = Figure((11, 4), layout="constrained")
    for axes, (x, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for run, points in zip(runs, lines, strict=True):
            colour, *dashed = run.style.split()
            line = {"color": COLOURS[colour], "linestyle": "--" if dashed else "-"}
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axes.plot(xs, ys, marker=".", label=run.name, **line)
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:,.0f}")
        else:
            axes.set_xlim(left=0)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)
    return path
