"""Needle accuracy as a picture: context length against depth, the number in every cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

TITLES = {"generation": "generated", "ranking": "ranked first"}


def save_heatmap(results: dict, path: Path) -> None:
    """Two panels for each task, generation and ranking, from the results of eval.needle.

    The map, cividis, is even in lightness and reads the same with colour-blind eyes.
    """
    cells, tasks = results["cells"], list(results["chance"])
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    width, height = 2.2 + 0.75 * len(lengths), 1.9 + 0.42 * len(depths)
    size = 2 * max(width, 4.2), max(height, 3.4) * len(tasks)
    figure = Figure(size, layout="constrained")
    rows = figure.subplots(len(tasks), 2, sharey=True, squeeze=False)
    for task, panels in zip(tasks, rows, strict=True):
        chance = f" (chance {100 * results['chance'][task]:.3g} %)"
        for panel, (score, title) in zip(panels, TITLES.items(), strict=True):
            at = {(c["depth"], c["length"]): c[score] for c in cells if c["task"] == task}
            grid = np.array([[at[depth, length] for length in lengths] for depth in depths])
            image = panel.imshow(100 * grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
            for (row, column), value in np.ndenumerate(grid):
                colour = "white" if value < 0.5 else "black"
                text = f"{100 * value:.0f}"
                panel.text(column, row, text, ha="center", va="center", color=colour)
            name = task.replace("_", "-")
            panel.set_title(f"{name}: {title}{chance * (score == 'ranking')}", fontsize=10)
            panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            panel.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
            panel.set_xlabel("context length (tokens)")
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
        panels[0].set_ylabel("depth of the needle (%)")
    bar = figure.colorbar(image, ax=rows, label="accuracy (%)", pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    samples = cells[0]["samples"]
    figure.suptitle(f"Needle in a haystack, step {results['step']:,}, {samples} samples a cell")
    figure.savefig(path, dpi=150)
