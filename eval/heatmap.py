"""Needle accuracy as a picture: context length against depth, the number in every cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

TITLES = {"generation": "Answer generated", "ranking": "Answer ranked first"}


def save_heatmap(results: dict, path: Path) -> None:
    """Two panels, generation and ranking, from the results of eval.needle.

    The map, cividis, is even in lightness and reads the same with colour-blind eyes.
    """
    lengths = sorted({cell["length"] for cell in results["cells"]})
    depths = sorted({cell["depth"] for cell in results["cells"]})
    width, height = 2.2 + 0.75 * len(lengths), 1.9 + 0.42 * len(depths)
    figure = Figure((2 * max(width, 3.6), max(height, 3.4)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (score, title) in zip(panels, TITLES.items(), strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for cell in results["cells"]:
            grid[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell[score]
        image = panel.imshow(100 * grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            colour = "white" if value < 0.5 else "black"
            panel.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour)
        chance = f"  (chance {100 * results['chance']:.3g} %)" if score == "ranking" else ""
        panel.set_title(title + chance, fontsize=11)
        panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        panel.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
        panel.set_xlabel("context length (tokens)")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    panels[0].set_ylabel("depth of the needle (%)")
    figure.colorbar(image, ax=panels, label="accuracy (%)", pad=0.02).outline.set_visible(False)
    samples = results["cells"][0]["samples"]
    figure.suptitle(f"Needle in a haystack, step {results['step']:,}, {samples} samples a cell")
    figure.savefig(path, dpi=150)
