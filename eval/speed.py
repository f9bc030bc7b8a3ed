"""Tables and figures of what scripts/bench_attention.py and scripts/benchmark_step.py measured."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator

# Query heads, KV heads, head dimension.
SHAPES = {"a": (64, 4, 128), "b": (16, 1, 128), "c": (16, 4, 128), "d": (16, 4, 64)}


def tables(results: dict) -> str:
    """The results as markdown."""
    whole = {
        (row["shape"], row["tokens"], row["what"], row["direction"]): row
        for row in results["whole"]
    }
    shapes = list(dict.fromkeys(row["shape"] for row in results["whole"]))
    lengths = list(dict.fromkeys(row["tokens"] for row in results["whole"]))
    names = list(dict.fromkeys(row["what"] for row in results["whole"]))
    lines = [
        f"{results['device']}, torch {results['torch']}, Triton {results['triton']}, "
        f"{results['date']}, commit {results['commit']}: `{results['command']}`. Milliseconds "
        "forward / backward; in brackets how many times faster than cuDNN.",
        "",
        "| shape | tokens | " + " | ".join(names) + " | GB above inputs |",
        "|---|---|" + "---|" * len(names) + "---|",
    ]
    for shape, tokens in product(shapes, lengths):
        cells, memory = [], 0.0
        for name in names:
            pair = [whole.get((shape, tokens, name, way)) for way in ("forward", "backward")]
            if None in pair:
                cells.append("")
                continue
            cell = " / ".join(f"{row['ms']:.2f}" for row in pair)
            if name.startswith("nsa"):
                full = [whole[shape, tokens, "cudnn", way] for way in ("forward", "backward")]
                ratio = [f"{f['ms'] / row['ms']:.1f}" for f, row in zip(full, pair, strict=True)]
                cell += f" ({' / '.join(ratio)})"
                memory = max(memory, pair[0].get("memory_gb", 0.0))
            cells.append(cell)
        lines.append(f"| {_spell(shape)} | {tokens:,} | {' | '.join(cells)} | {memory:.1f} |")
    lines += _crossover(whole, shapes, lengths, [name for name in names if name.startswith("nsa")])
    parts = list(dict.fromkeys(row["part"] for row in results["parts"]))
    found = {}
    for row in results["parts"]:
        key = _spell(row["shape"]), row["tokens"], row["what"], row["direction"]
        found.setdefault(key, {})[row["part"]] = row
    lines += [
        "",
        "By part, ms (TFLOP/s, share of the floor):",
        "",
        "| shape | tokens | selection | direction | " + " | ".join(parts) + " |",
        "|---|---|---|---|" + "---|" * len(parts),
    ]
    for (shape, tokens, name, way), row in found.items():
        cells = [_part_cell(row.get(part)) for part in parts]
        lines.append(f"| {shape} | {tokens:,} | {name} | {way} | {' | '.join(cells)} |")
    lines += [
        "",
        "One decode step in a CUDA graph, µs:",
        "",
        "| shape | batch | tokens | nsa | flash, full cache | ratio |",
        "|---|---|---|---|---|---|",
    ]
    pairs = {}
    for row in results["decode"]:
        key = row["shape"], row["batch"], row["tokens"]
        pairs.setdefault(key, {})[row["what"]] = 1e3 * row["ms"]
    for (shape, batch, tokens), us in pairs.items():
        lines.append(
            f"| {_spell(shape)} | {batch} | {tokens:,} | {us['nsa']:.1f} | {us['flash']:.1f} | "
            f"{us['flash'] / us['nsa']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _crossover(whole: dict, shapes: list, lengths: list, names: list) -> list[str]:
    """How many times faster than cuDNN at every length, and from which length on."""
    lines = [
        "",
        "Forward and backward together, how many times faster than cuDNN, and from which of these "
        "lengths on at least as fast:",
        "",
        "| shape | selection | " + " | ".join(f"{n:,}" for n in lengths) + " | from |",
        "|---|---|" + "---|" * len(lengths) + "---|",
    ]
    for shape, name in product(shapes, names):
        ratios = {}
        for tokens in lengths:
            full, own = (
                [whole.get((shape, tokens, what, way)) for way in ("forward", "backward")]
                for what in ("cudnn", name)
            )
            if None not in own:
                ratios[tokens] = sum(row["ms"] for row in full) / sum(row["ms"] for row in own)
        slower = [tokens for tokens, ratio in ratios.items() if ratio < 1]
        faster = [tokens for tokens in ratios if not slower or tokens > max(slower)]
        cells = [f"{ratios[tokens]:.2f}" if tokens in ratios else "" for tokens in lengths]
        cells.append(f"{min(faster):,}" if faster else "")
        lines.append(f"| {_spell(shape)} | {name} | {' | '.join(cells)} |")
    return lines


def _spell(shape: str) -> str:
    return f"{shape} {'/'.join(map(str, SHAPES[shape]))}"


def _part_cell(row: dict | None) -> str:
    if row is None:
        return ""
    speed = f"{row['tflops']:.0f}, " if "tflops" in row else ""
    return f"{row['ms']:.2f} ({speed}{100 * row['floor_share']:.0f} %)"


def save_figure(results: dict, path: Path) -> None:
    """Forward and backward together against length, one panel per shape, both axes doubling."""
    styles = {
        "flash": ("FlashAttention-2, full", "#8a8a8a", "--"),
        "cudnn": ("cuDNN, full", "#333333", "-"),
        "nsa random": ("NSA, random selection", "#7fb3d5", ":"),
        "nsa 85 %": ("NSA, 85 % shared", "#0b61a4", "-"),
        "nsa 85 %, CUDA graph": ("NSA, 85 %, CUDA graph", "#2a9d5c", "-."),
        "nsa trained": ("NSA, trained selection", "#c46210", "-"),
    }
    shapes = list(dict.fromkeys(row["shape"] for row in results["whole"]))
    figure = Figure((3.2 * len(shapes) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    for panel, shape in zip(panels, shapes, strict=True):
        for name, (label, color, line) in styles.items():
            total = {}
            for row in results["whole"]:
                if (row["shape"], row["what"]) == (shape, name):
                    total[row["tokens"]] = total.get(row["tokens"], 0.0) + row["ms"]
            if total:
                panel.plot(*zip(*sorted(total.items()), strict=True), line, color=color, label=label,
                           marker="o", markersize=3.5)  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        # Lengths between powers of two lie too close to be labelled.
        ticks = sorted({n for row in results["whole"] if (n := row["tokens"]).bit_count() == 1})
        panel.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
        heads, kv_heads, dim = SHAPES[shape]
        panel.set_title(f"{heads} heads, {kv_heads} KV, dim {dim}", fontsize=10)
        panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("tokens")
    panels[0].set_ylabel("forward + backward (ms)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)


def save_growth(variants: dict, path: Path) -> None:
    """Time of a sequence against its length, a training step and a forward pass, for variants named
    "<recipe> at <n>k" of which there are several lengths; the numbers are how many times longer than at
    half the length."""
    lines: dict[str, dict[int, float]] = {}
    for name, result in variants.items():
        if (found := re.fullmatch(r"(.+) at (\d+)k", name)) and "tokens_per_s" in result:
            length = int(found[2]) << 10
            lines.setdefault(f"{found[1]}, step", {})[length] = length / result["tokens_per_s"]
            if "forward_s" in result:
                lines.setdefault(f"{found[1]}, forward", {})[length] = result["forward_s"]
    lines = {name: dict(sorted(times.items())) for name, times in lines.items() if len(times) > 1}
    if not lines:
        return
    figure = Figure((5.2, 4.0), layout="constrained")
    panel = figure.subplots()
    for name, times in lines.items():
        (drawn,) = panel.plot(
            *zip(*times.items(), strict=True), marker="o", markersize=4, label=name
        )
        for length, seconds in times.items():
            if length // 2 in times:
                panel.annotate(
                    f"{seconds / times[length // 2]:.2f}", (length, seconds), (4, -11),
                    textcoords="offset points", color=drawn.get_color(), fontsize=9,
                    path_effects=[withStroke(linewidth=3, foreground="white")],
                )  # fmt: skip
    ticks = sorted({length for times in lines.values() for length in times})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [f"{n >> 10}k" for n in ticks])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set(xlabel="tokens of a sequence", ylabel="seconds a sequence")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
