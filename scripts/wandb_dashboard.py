"""The W&B workspace of a project as code, and a look into the runs that were recorded offline.

    python scripts/wandb_dashboard.py run=outputs/quickstart         what its W&B file holds, by panel
    python scripts/wandb_dashboard.py project=nsa-lm entity=me       build the workspace on the server

An offline run is uploaded by `wandb sync outputs/<name>/wandb/offline-run-*`, with the results and
pictures of its evaluations, which lie beside it as runs of their own. Building needs pip install
wandb-workspaces, and a key (wandb login).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import hydra
from omegaconf import DictConfig

from data.config import command_line, from_config, resolve_path

# Section -> panels: title -> series; a pattern stands for as many series as a run has layers.
SECTIONS = {
    "Loss": {
        "Training loss (nats per token)": ["loss"],
        "Validation loss (nats per token)": ["val/loss"],
        "Validation (bits per byte)": ["val/bpb"],
        "Loss on answers of tasks (nats per token)": ["answer_loss"],
        "z-loss": ["z_loss"],
        "Gradient norm": ["grad_norm"],
        "Update norm": ["update_norm"],
        "Learning rate": ["lr"],
        "Skipped steps": ["skipped"],
    },
    "Throughput": {
        "Tokens per second": ["tokens_per_s"],
        "MFU": ["mfu"],
        "Seconds of a step, by part": [
            "seconds/data", "seconds/forward", "seconds/backward", "seconds/optimizer",
        ],
        "Memory (GB)": ["memory_gb"],
    },
    "Gates": {
        "Compressed branch, by layer": [r"gates/compressed/layer_\d+"],
        "Selected branch, by layer": [r"gates/selected/layer_\d+"],
        "Window branch, by layer": [r"gates/window/layer_\d+"],
    },
    "Selection": {
        "Overlap with the token before": ["selection/overlap"],
        "Overlap, by layer": [r"selection/overlap/layer_\d+"],
        "Share taken always": ["selection/forced"],
    },
}  # fmt: skip
OPTIONAL = {"answer_loss", "z_loss", "mfu", "memory_gb"}  # with tasks; with a z-loss; on a GPU
HEATMAPS = "needle"  # the name under which needle grids log them


@dataclass(frozen=True)
class DashboardSettings:
    """conf/dashboard.yaml"""

    run: str | None
    project: str | None
    entity: str | None


def recorded(run: Path) -> set[str]:
    """Names of all series in a run's offline W&B files. Raises FileNotFoundError without one."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    if not files:
        raise FileNotFoundError(f"{run} holds no offline W&B run; train it with log.wandb=offline.")
    names = set()
    for file in files:
        for data in _records(file.read_bytes()):
            for item in Record.FromString(data).history.item:
                names.add(item.key or "/".join(item.nested_key))
    return names


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log behind a header of 7 bytes: blocks of
    32 KiB, and in them pieces (checksum 4 bytes, length 2, kind 1: whole, first, middle, last)."""
    at, block, record = 7, 32768, b""
    while at + 7 <= len(data):
        room = block - at % block
        if room < 7:  # the rest of a block that holds no piece
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def listing(names: set[str]) -> list[str]:
    """A line for each group of series: what all layers have counts once, of a picture only its name."""
    pictures = {name.removesuffix("/_type") for name in names if name.endswith("/_type")}
    groups: dict[str, dict[str, None]] = {}
    for name in sorted(names):
        head, _, last = name.rpartition("/")
        shown = head if head in pictures and last not in pictures else name
        group, _, rest = re.sub(r"layer_\d+", "layer_…", shown).partition("/")
        groups.setdefault(group if rest else "", {})[rest or group] = None
    return [f"{group or 'alone'}: {', '.join(rest)}" for group, rest in sorted(groups.items())]


def missing(names: set[str]) -> dict[str, list[str]]:
    """Panels that would stay empty -> their series that nothing in `names` matches."""
    empty = {}
    for panels in SECTIONS.values():
        for title, series in panels.items():
            absent = [s for s in series if not any(re.fullmatch(s, name) for name in names)]
            if absent := [s for s in absent if s not in OPTIONAL]:
                empty[title] = absent
    return empty


def workspace(entity: str, project: str):
    """The workspace; nothing is sent before its save()."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise ValueError("Building a workspace needs: pip install wandb-workspaces") from None
    sections = []
    for name, charts in SECTIONS.items():
        plots = []
        for title, series in charts.items():
            pattern = len(series) == 1 and "\\" in series[0]
            chosen = {"metric_regex": series[0]} if pattern else {"y": series}
            plots.append(panels.LinePlot(title=title, x="tokens", **chosen))
        sections.append(workspaces.Section(name=name, panels=plots, is_open=True))
    heatmaps = panels.MediaBrowser(title="Needle in a haystack", media_keys=[HEATMAPS])
    compare = [
        panels.LinePlot(
            title=f"{title}, by attention", x="tokens", y=[key],
            groupby=panels.Config("attention._target_"),
        )
        for title, key in (("Bits per byte", "val/bpb"), ("Tokens per second", "tokens_per_s"))
    ]  # fmt: skip
    sections.append(workspaces.Section(name="Needle", panels=[heatmaps], is_open=True))
    sections.append(
        workspaces.Section(name="Attention designs", panels=[*compare, panels.RunComparer()])
    )
    return workspaces.Workspace(
        entity=entity, project=project, name="nsa-lm", sections=sections,
    )  # fmt: skip


@hydra.main(version_base=None, config_path="../conf", config_name="dashboard")
def main(config: DictConfig) -> None:
    try:
        settings = from_config(DashboardSettings, config)
        if not (settings.run or settings.project):
            raise ValueError(
                "give run=outputs/<name> to list what its offline W&B files hold, or project=… "
                "entity=… to build the workspace."
            )
        if settings.run:
            run = resolve_path(settings.run)
            names = recorded(run)
            print(f"{len(names)} series", *listing(names), sep="\n  ")
            for title, absent in missing(names).items():
                print(f"empty panel: {title} ({', '.join(absent)})")
            print(f"upload with: wandb sync {run}/wandb/offline-run-*")
        if settings.project:
            if not settings.entity:
                raise ValueError("dashboard.entity is missing; give the W&B user or team, entity=…")
            print(f"workspace: {workspace(settings.entity, settings.project).save().url}")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
