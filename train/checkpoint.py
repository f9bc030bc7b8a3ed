"""Saving and resuming a run.

outputs/<name>/checkpoints/step_00000100/
    model.safetensors, config.yaml, tokenizer.json   the model alone (model/checkpoint.py reads it)
    deepspeed/                                       every rank's parameters and optimizer state
    state.json                                       what the loop knows; written last
A checkpoint is built under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
import yaml
from tokenizers import Tokenizer

from model.checkpoint import CONFIG, save_weights

STATE = "state.json"


@dataclass
class TrainState:
    """All that the loop remembers. The loader has no state but the number of samples."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent training, over all sittings
    data: str = ""  # fingerprint of the training shards


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint under a run's folder."""
    whole = sorted(folder.glob(f"checkpoints/step_*/{STATE}"))
    return whole[-1].parent if whole else None


def check_resume(folder: Path, resume: bool | str, config: dict) -> None:
    """Refuse what would mix two runs in one folder, with one sentence.

    resume=False wants a folder without checkpoints, True one with, "auto" takes either. The model
    and its tokenizer must be the checkpoint's.
    """
    found = newest_checkpoint(folder)
    if found is None:
        if resume is True:
            raise FileNotFoundError(
                f"train.resume=true, but {folder} has no checkpoint; start the run without it."
            )
        return
    if resume is False:
        raise ValueError(
            f"{folder} already holds a run ({found.name}). Continue it with train.resume=true, "
            "give this one another name=…, or delete the folder."
        )
    stored = yaml.safe_load((found / CONFIG).read_text())
    for group in ("model", "attention", "tokenizer"):
        for key in stored[group] | config[group]:
            before, now = stored[group].get(key), config[group].get(key)
            if before != now:
                raise ValueError(
                    f"{group}.{key} is {now}, but the run in {folder} was started with {before}; "
                    "set it back, or give this run another name=…"
                )


def check_same_data(folder: Path, fingerprint: str) -> None:
    """Raise ValueError if the run in `folder` was trained on shards with another fingerprint."""
    found = newest_checkpoint(folder)
    if found and json.loads((found / STATE).read_text())["data"] != fingerprint:
        raise ValueError(
            f"The training data differs from that of {found} (its tokens or its tokenizer); restore "
            "it, or start a new run with another name=…"
        )


def save_checkpoint(
    folder: Path, engine, state: TrainState, config: dict, tokenizer: Tokenizer, keep: int
) -> Path:
    """Write checkpoints/step_<n> and drop all but the newest `keep`. All ranks call it."""
    final = folder / "checkpoints" / f"step_{state.step:08d}"
    building = final.with_name("incomplete_" + final.name)
    if dist.get_rank() == 0:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(building), tag="deepspeed", save_latest=False)
    if engine.zero_optimization_stage() == 3:
        weights = engine._zero3_consolidated_16bit_state_dict()
    else:
        weights = engine.module.state_dict()
    dist.barrier()
    if dist.get_rank() == 0:
        save_weights(building, weights, config, tokenizer)
        (building / STATE).write_text(json.dumps(asdict(state)))
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        for old in sorted(final.parent.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(path: Path, engine) -> TrainState:
    """Put a checkpoint's parameters and optimizer state into the engine; returns the loop's state."""
    engine.load_checkpoint(str(path), tag="deepspeed")
    return TrainState(**json.loads((path / STATE).read_text()))
