"""A run on one page, or several beside each other:

    python eval/report.py run=outputs/quickstart
    python eval/report.py runs=[outputs/quickstart,outputs/full]

Reads what a run's folder holds and writes report.html into it (of several, comparison_path): one
file, no network, no scripts. What is not there yet is left out with a sentence.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import hydra
import yaml
from omegaconf import DictConfig
from safetensors import safe_open

from data.config import command_line, from_config, resolve_path
from eval.baseline import run_baseline, run_config
from eval.charts import Series, heat_table, line_chart, si, smooth
from eval.charts import table as _table
from eval.compare import comparison, long_context
from model.checkpoint import WEIGHTS, find_checkpoint

STYLES = ("line", "second", "third", "fourth")
STEP_PARTS = ("data", "forward", "backward", "optimizer")
BRANCHES = ("compressed", "selected", "window")


@dataclass(frozen=True)
class Run:
    """Everything the report knows of a run; what is missing is empty or None."""

    folder: Path
    config: dict
    training: list[dict]  # lines of metrics.jsonl that have a loss
    validation: list[dict]  # and those that have a validation loss
    scored: list[dict]  # and those of needle grids inside training
    needle: dict | None  # newest results of eval.needle, and of the other evaluations
    ruler: dict | None
    position: dict | None
    recall: dict | None
    environment: dict
    data: dict
    num_parameters: int | None
    baseline: dict | None = None  # which takes a while: of a run's own page alone
    style: str = "run0"  # CSS class of its lines beside those of other runs

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def lengths(self) -> str:
        """The lengths of its sequences, stage by stage; empty if it does not say."""
        train = self.config.get("train", {})
        stages = [train, *train.get("stages", [])]
        return ", then ".join(f"{x['seq_len']:,}" for x in stages if "seq_len" in x)


@dataclass(frozen=True)
class ReportSettings:
    """conf/report.yaml"""

    run: str
    runs: list[str] | None
    comparison_path: str


def load_run(folder: str | Path) -> Run:
    """Read a run's folder. Raises FileNotFoundError or ValueError with one sentence."""
    folder = Path(folder)
    metrics = _metrics(folder / "metrics.jsonl")
    return Run(
        folder=folder,
        config=run_config(folder),
        training=[m for m in metrics if "loss" in m],
        validation=[m for m in metrics if "val/loss" in m],
        scored=[m for m in metrics if any(key.startswith("needle/") for key in m)],
        needle=_newest(folder / "eval" / "needle"),
        ruler=_newest(folder / "eval" / "ruler"),
        position=_newest(folder / "eval" / "position"),
        recall=_newest(folder / "eval" / "recall"),
        environment=_json(folder / "environment.json") or {},
        data=_json(folder / "data_summary.json") or {},
        num_parameters=_num_parameters(folder),
    )


def load_views(
    folders: Sequence[Path], views: Mapping[str, Sequence[Path]]
) -> tuple[list[Run], dict[str, list[Run]]]:
    """Runs of these folders, and groups of them by what they have in common.

    A run's place in its group gives its lines' colour, so a recipe has one; a run that comes in
    later groups alone has dashed lines.
    """
    groups = {title: list(group) for title, group in views.items() if group}
    styles: dict[Path, str] = {}
    for number, group in enumerate(groups.values() or [folders]):
        for place, folder in enumerate(group):
            styles.setdefault(folder, f"run{place % 8}{' dashed' if number else ''}")
    runs = {f: replace(load_run(f), style=styles.get(f, "run0")) for f in folders}
    return list(runs.values()), {title: [runs[f] for f in g] for title, g in groups.items()}


def _metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line still being written is left."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            if line.endswith("\n"):
                raise ValueError(f"{path}, line {number}, is not JSON.") from None
    return metrics


def _json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        raise ValueError(f"{path} is not JSON.") from None


def _newest(folder: Path) -> dict | None:
    """Results of the latest step; a file without one is still being measured."""
    found = [_json(path) for path in folder.glob("*.json")]
    return max((r for r in found if "step" in r), key=lambda r: r["step"], default=None)


def _baseline(folder: Path) -> dict | None:
    """The order-2 model on the run's data, measured now if that has not been done."""
    try:
        return run_baseline(folder)
    except FileNotFoundError:  # the data has moved
        return None


def _num_parameters(folder: Path) -> int | None:
    try:
        weights = find_checkpoint(folder) / WEIGHTS
    except FileNotFoundError:
        return None
    with safe_open(weights, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


# ---------------------------------------------------------------------------------------------------
# The page


def write_report(folder: str | Path) -> Path:
    """Write <folder>/report.html and return its path. Raises as load_run does."""
    run = replace(load_run(folder), baseline=_baseline(Path(folder)))
    path = run.folder / "report.html"
    body = (
        f"{_header(run)}{_cards(run)}{_training(run)}{_attention(run)}{_needle(run)}"
        f"{long_context([run])}{_data(run)}{_setting(run)}"
    )
    path.write_text(_page(run.name, body), encoding="utf-8")
    return path


def write_comparison(
    folders: Sequence[Path], path: Path, views: Mapping[str, Sequence[Path]] | None = None
) -> Path:
    """Write a page of several runs beside each other to `path`. Raises as load_run does.

    views: groups of the runs whose last losses are to be compared, by what they have in common.
    """
    runs, groups = load_views(folders, views or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page("Comparison", comparison(runs, groups)), encoding="utf-8")
    return path


def _page(title: str, body: str) -> str:
    css = Path(__file__).with_name("report.css").read_text()
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: nsa-lm</title><style>{css}</style>{body}"
        "<footer>Written by <code>python eval/report.py</code> from the files of the run.</footer>"
        "</html>\n"
    )


def _header(run: Run) -> str:
    attention = str(run.config.get("attention", {}).get("_target_", "")).rpartition(".")[2]
    parts = [attention] if attention else []
    if run.lengths:
        parts.append(f"sequences of {run.lengths} tokens")
    if run.training:
        parts.append(f"step {run.training[-1]['step']:,}")
    return f"<header><h1>{escape(run.name)}</h1><p>{escape(' · '.join(parts))}</p></header>"


def _cards(run: Run) -> str:
    """The headline numbers."""
    cards = []
    if run.validation and "val/bpb" in run.validation[-1]:
        ours = run.validation[-1]["val/bpb"]
        against = "bits per byte of held-out text"
        if run.baseline:
            theirs = run.baseline["bits_per_byte"]
            side = "below" if ours < theirs else "above"
            against += f"; {abs(1 - ours / theirs):.0%} {side} an order-2 model's {theirs:.3f}"
        cards.append(("Validation", f"{ours:.3f}", against))
    if run.needle:
        for score, label in (("generation", "generated"), ("ranking", "ranked first")):
            task, chance = next(iter(run.needle["chance"].items()))
            by_length = [row for row in run.needle["by_length"] if row["task"] == task]
            note = ", ".join(f"{row[score]:.0%} at {row['length']:,}" for row in by_length)
            if score == "ranking":
                note += f"; chance is {100 * chance:.3g} %"
            mean = statistics.fmean(row[score] for row in by_length)
            cards.append((f"Needle {label}", f"{mean:.0%}", note))
    if run.num_parameters:
        rounded = si(float(f"{run.num_parameters:.3g}"))
        cards.append(("Parameters", rounded, "tied matrices counted once"))
    if run.training:
        last = run.training[-1]
        speed = statistics.median(m["tokens_per_s"] for m in run.training)
        notes = [f"median of {len(run.training):,} steps"]
        if "mfu" in last:
            notes.append(f"MFU {statistics.median(m.get('mfu', 0) for m in run.training):.1%}")
        if "memory_gb" in last:
            notes.append(f"{max(m.get('memory_gb', 0) for m in run.training):.1f} GB at most")
        cards.append(("Tokens per second", f"{speed:,.0f}", ", ".join(notes)))
        cards.append(("Training time", _duration(last["time"]), f"{last['tokens']:,} tokens"))
    body = "".join(
        f'<div class="card"><span>{escape(a)}</span><b>{escape(b)}</b><span>{escape(c)}</span></div>'
        for a, b, c in cards
    )
    return f'<div class="cards">{body}</div>'


def _training(run: Run) -> str:
    def of(key: str, lines: list[dict] = run.training) -> list[tuple[float, float]]:
        return [(m["tokens"], m[key]) for m in lines if m.get(key) is not None]

    if not run.training:
        return _missing("Training", "No step has been recorded yet.")
    loss, validation = of("loss"), of("val/loss", run.validation)
    skipped = run.training[-1].get("skipped", 0)
    bpb = [Series("validation", of("val/bpb", run.validation), "second")]
    if run.baseline and bpb[0].points:
        bpb.append(Series("order-2 model", [(0, run.baseline["bits_per_byte"])], "rule"))
    curves = [
        line_chart(
            "Loss (nats per token)",
            [*_smoothed(loss), Series("validation", validation, "second")],
        ),
        line_chart("Bits per byte of held-out text", bpb),
    ]
    details = [
        line_chart("Learning rate", [Series("", of("lr"))]),
        line_chart("Loss on answers of tasks (nats per token)", _smoothed(of("answer_loss"))),
        line_chart("Gradient norm", _smoothed(of("grad_norm")), log=True),
        line_chart("Tokens per second", _smoothed(of("tokens_per_s"))),
        line_chart("MFU (share of the card's peak)", _smoothed(of("mfu"))),
        line_chart("Memory at its peak (GB)", [Series("", of("memory_gb"))]),
        line_chart("Update norm", [Series("", of("update_norm"))], log=True),
        line_chart("Skipped steps, in total", [Series("", of("skipped"))] if skipped else []),
        line_chart(
            "Seconds of a step, by part",
            [
                Series(part, smooth(of(f"seconds/{part}")), style)
                for part, style in zip(STEP_PARTS, STYLES, strict=True)
            ],
        ),
    ]
    note = ""
    if not run.validation:
        note = '<p class="quiet">No validation has been recorded yet.</p>'
    elif not run.baseline:
        note = '<p class="quiet">No order-2 model beside it: the prepared data has moved.</p>'
    return (
        f'<h2>Training</h2>{note}<div class="grid two">{"".join(curves)}</div>'
        f'<div class="grid three">{"".join(details)}</div>'
    )


def _attention(run: Run) -> str:
    """What NSA's gates and selection did on held-out text, at each validation."""
    seen = [m for m in run.validation if "selection/distance" in m]
    if not seen:
        return ""
    last, layers = seen[-1], range(sum(key.startswith("gates/window/") for key in seen[-1]))

    def over_time(key: str) -> list[tuple[float, float]]:
        return [(m["tokens"], m[key]) for m in seen]

    def mean_gate(m: dict, branch: str) -> float:
        return statistics.fmean(m[f"gates/{branch}/layer_{i:02d}"] for i in layers)

    gates = [
        Series(branch, [(m["tokens"], mean_gate(m, branch)) for m in seen], style)
        for branch, style in zip(BRANCHES, STYLES, strict=False)
    ]
    shares = [
        Series("overlap with the token before", over_time("selection/overlap")),
        Series("taken always", over_time("selection/forced"), "second"),
    ]
    rows = [("layer", *BRANCHES, "overlap", "always")]
    for i in layers:
        keys = [f"gates/{branch}" for branch in BRANCHES] + [
            "selection/overlap",
            "selection/forced",
        ]
        rows.append((str(i), *(f"{last[f'{key}/layer_{i:02d}']:.3f}" for key in keys)))
    distances = [("blocks back", "share of the selected")]
    for i, share in enumerate(last["selection/distance"]):
        if share:
            low, high = (0, 0) if i == 0 else (2 ** (i - 1), 2**i - 1)
            distances.append((f"{low:,}" if low == high else f"{low:,} – {high:,}", f"{share:.1%}"))
    return (
        "<h2>Sparse attention</h2><p class='quiet'>Mean gate of each branch and what the selection "
        "takes, on the first validation batch.</p>"
        f'<div class="grid two">{line_chart("Gates, mean over layers and heads", gates)}'
        f"{line_chart('Selected blocks', shares)}</div>"
        f'<div class="grid two"><figure><figcaption><b>Last validation, by layer</b></figcaption>'
        f"{_table(rows)}</figure><figure>{_table(distances)}</figure></div>"
    )


def _smoothed(points: list[tuple[float, float]]) -> list[Series]:
    return [Series("each step", points, "faint"), Series("mean", smooth(points))]


def _needle(run: Run) -> str:
    if not run.needle:
        return _missing(
            "Needle in a haystack", "Not measured yet:",
            f"python eval/needle.py checkpoint={run.folder}",
        )  # fmt: skip
    needle, settings = run.needle, run.needle["settings"]
    intro = (
        f"Sentences with magic values ({settings['values']}) are hidden in held-out text, and the "
        f"prompt ends by asking for them; {needle['cells'][0]['samples']} samples a cell, step "
        f"{needle['step']:,}. Generated: the value occurs in the model's answer of at most "
        f"{settings['max_new_tokens']} tokens for each. Ranked first: it is the likeliest of "
        f"{settings['candidates']} values."
    )
    grids, rows = "", [
        ("task", "length", "samples", "generated", "95 % interval", "ranked first", "95 % interval")
    ]  # fmt: skip
    for task, chance in needle["chance"].items():
        cells, name = [c for c in needle["cells"] if c["task"] == task], task.replace("_", "-")
        grids += heat_table(f"{name}: answer generated", cells, "generation")
        grids += heat_table(
            f"{name}: answer ranked first (chance {100 * chance:.3g} %)", cells, "ranking"
        )
    for row in needle["by_length"]:
        cells = [row["task"].replace("_", "-"), f"{row['length']:,}", f"{row['samples']:,}"]
        for score in ("generation", "ranking"):
            cells.append(f"{row[score]:.0%}")
            cells.append(f"{row[score + '_low']:.0%} – {row[score + '_high']:.0%}")
        rows.append(tuple(cells))
    example = max(needle["samples"], key=lambda s: (s["generation"], s["ranking"]))
    hidden = " … ".join(example["needles"])
    grids += _needle_over_time(run)
    return (
        f'<h2>Needle in a haystack</h2><p class="quiet">{escape(intro)}</p>'
        f'<div class="grid two">{grids}</div><figure>{_table(rows)}</figure>'
        f"<details><summary>A sample, word for word</summary><blockquote>… {escape(hidden)} …"
        f"</blockquote><blockquote>{escape(example['question'])}</blockquote><p>The model went on:</p>"
        f"<blockquote>{escape(example['generated'])}</blockquote></details>"
    )


def _needle_over_time(run: Run) -> str:
    """Accuracy of the grids inside training, a line for each task and length."""
    charts = []
    for score in ("generation", "ranking", "selected"):
        names = [key for key in (run.scored or [{}])[-1] if key.endswith("/" + score)]
        if score == "selected" and not names:  # without NSA
            continue
        series = []
        for i, name in enumerate(names):
            _, task, length, _ = name.split("/")
            points = [(m["tokens"], m[name]) for m in run.scored if name in m]
            label = f"{task.replace('_', '-')}, {int(length):,}"
            series.append(Series(label, points, f"run{i % 8}"))
        title = "value's block selected, best layer" if score == "selected" else score
        charts.append(line_chart(f"During training: {title}", series))
    return "".join(charts)


def _data(run: Run) -> str:
    sides = [(side, run.data[side]) for side in ("train", "validation") if side in run.data]
    if not sides:
        return _missing("Data", "The run's folder has no data_summary.json.")
    rows = [("", *(side for side, _ in sides))]
    for key, value in sides[0][1].items():
        if isinstance(value, int | float):
            rows.append((key.replace("_", " "), *(f"{side.get(key, 0):,}" for _, side in sides)))
    facts = {k: v for k, v in _flat(run.data) if not k.startswith(("train.", "validation."))}
    return (
        f'<h2>Data</h2><div class="grid two"><figure>{_table(rows)}</figure>'
        f"<figure>{_facts(facts)}</figure></div>"
    )


def _setting(run: Run) -> str:
    """Environment and config."""
    environment = f"<figure>{_facts(run.environment)}</figure>"
    if not run.environment:
        environment = '<p class="quiet">The run\'s folder has no environment.json.</p>'
    config = escape(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
    return (
        f"<h2>Environment</h2>{environment}"
        f"<details><summary>Config</summary><pre>{config}</pre></details>"
    )


# ---------------------------------------------------------------------------------------------------
# Small parts


def _missing(title: str, sentence: str, command: str = "") -> str:
    code = f" <code>{escape(command)}</code>" if command else ""
    return f'<h2>{title}</h2><p class="quiet">{escape(sentence)}{code}</p>'


def _facts(facts: dict) -> str:
    rows = "".join(
        f"<tr><td>{escape(re.sub('[._]', ' ', str(key)))}</td><td>{escape(str(value))}</td></tr>"
        for key, value in facts.items()
    )
    return f'<table class="facts">{rows}</table>'


def _flat(tree: dict, prefix: str = ""):
    """(dotted key, value) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


@hydra.main(version_base=None, config_path="../conf", config_name="report")
def main(config: DictConfig) -> None:
    try:
        settings = from_config(ReportSettings, config)
        if settings.runs:
            folders = [resolve_path(run) for run in settings.runs]
            path = write_comparison(folders, resolve_path(settings.comparison_path))
        else:
            path = write_report(resolve_path(settings.run))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"report      {path}")


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
