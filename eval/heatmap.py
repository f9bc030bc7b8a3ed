"""Needle accuracy as a picture: context length against depth, the number in every cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TITLES = {"generation": "generated", "ranking": "ranked first"}


def save_heatmap(results: dict, path: Path) -> None:
    """Two panels for each task, generation and ranking, from the results of eval.needle.

    The map, cividis, is even in lightness and reads the same with colour-blind eyes.
    """
    panels = [[("", results, task, score) for score in TITLES] for task in results["chance"]]
    title = f"Needle in a haystack, step {results['step']:,}, {_samples(results)} samples a cell"
    _save(panels, title, path, dpi=150)


def save_heatmaps(runs: Mapping[str, dict], path: Path) -> None:
    """The same of several runs by name: a column for each, a row for each task and score.

    Where a run was not measured on a task, its place stays empty.
    """
    tasks = dict.fromkeys(task for results in runs.values() for task in results["chance"])
    panels = [
        [(f"{name}\n", results, task, score) for name, results in runs.items()]
        for task in tasks for score in TITLES
    ]  # fmt: skip
    samples = " / ".join(dict.fromkeys(map(_samples, runs.values())))
    _save(panels, f"Needle in a haystack, {samples} samples a cell", path, dpi=80)


def _title(results: dict, task: str, score: str) -> str:
    chance = f" (chance {100 * results['chance'][task]:.3g} %)" if score == "ranking" else ""
    return f"{task.replace('_', '-')}: {TITLES[score]}{chance}"


def _samples(results: dict) -> str:
    return str(results["cells"][0]["samples"])


def _save(panels: list[list[tuple[str, dict, str, str]]], title: str, path: Path, dpi: int) -> None:
    """panels: rows of (what its title begins with, results, task, score)."""
    cells = [cell for _, results, *_ in panels[0] for cell in results["cells"]]
    lengths, depths = len({c["length"] for c in cells}), len({c["depth"] for c in cells})
    width, height = max(2.2 + 0.75 * lengths, 4.2), max(1.9 + 0.42 * depths, 3.4)
    figure = Figure((len(panels[0]) * width, len(panels) * height), layout="constrained")
    rows = figure.subplots(len(panels), len(panels[0]), sharey=True, squeeze=False)
    for axes, row in zip(rows, panels, strict=True):
        for panel, (name, results, task, score) in zip(axes, row, strict=True):
            if task not in results["chance"]:
                panel.set_axis_off()
                continue
            image = _draw(panel, results, task, score)
            panel.set_title(name + _title(results, task, score), fontsize=10)
        axes[0].set_ylabel("depth of the needle (%)")
    bar = figure.colorbar(image, ax=rows, label="accuracy (%)", pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=dpi)


def _draw(panel: Axes, results: dict, task: str, score: str):
    at = {(c["depth"], c["length"]): c[score] for c in results["cells"] if c["task"] == task}
    depths, lengths = (sorted({key[i] for key in at}) for i in (0, 1))
    grid = np.array([[at[depth, length] for length in lengths] for depth in depths])
    image = panel.imshow(100 * grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        colour = "white" if value < 0.5 else "black"
        panel.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour)
    panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    panel.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    panel.set_xlabel("context length (tokens)")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    return image
