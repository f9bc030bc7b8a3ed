"""Saving and resuming a run.

outputs/<name>/checkpoints/step_00000100/
    model.safetensors, config.yaml, tokenizer.json   the model alone (model/checkpoint.py reads it)
    optimizer_<rank>_of_<ranks>.safetensors          fp32 parameters and optimizer state, in pieces
    state.json                                       what the loop knows; written last
A checkpoint is built under a temporary name and renamed when it is whole and on the disk. The pieces
say which elements of which parameter they are, so any number of ranks and any ZeRO stage can go on.
Nothing in a checkpoint is code, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from model.build import with_defaults
from model.checkpoint import CONFIG, save_weights
from train.config import RunConfig
from train.engine import Engine
from train.partition import Piece, pieces, refresh

STATE = "state.json"
PATIENCE = 1800  # seconds that rank 0 waits for the others' pieces


@dataclass
class TrainState:
    """All that the loop remembers. What the data has shown follows from the number of steps."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent training, over all sittings
    updates: int = 0  # steps that were not skipped
    skipped_in_row: int = 0
    validated: int = 0  # last step with a validation loss
    recent: list[list[float]] = field(default_factory=list)  # losses and gradient norms
    data: str = ""  # fingerprint of the training data
    code: str = ""  # fingerprint of the source files

    @property
    def skipped(self) -> int:
        return self.step - self.updates


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint under a run's folder."""
    whole = sorted(folder.glob(f"checkpoints/step_*/{STATE}"))
    return whole[-1].parent if whole else None


def read_state(checkpoint: Path) -> TrainState:
    return TrainState(**json.loads((checkpoint / STATE).read_text()))


def check_resume(run: RunConfig) -> None:
    """Refuse what would mix two runs in one folder, with one sentence.

    train.resume=false wants a folder without checkpoints, true one with, "auto" takes either. The
    model, its tokenizer and the optimizer must be the checkpoint's.
    """
    folder, found = run.folder, newest_checkpoint(run.folder)
    if found is None:
        if run.train.resume is True:
            raise FileNotFoundError(
                f"train.resume=true, but {folder} has no checkpoint; start the run without it."
            )
        return
    if run.train.resume is False:
        raise ValueError(
            f"{folder} already holds a run ({found.name}). Continue it with train.resume=true, "
            "give this one another name=…, or delete the folder."
        )
    stored = yaml.safe_load((found / CONFIG).read_text())
    config = run.as_trained(read_state(found).step)
    for side in stored, config:  # where either has no value for a key, it has its default
        side["model"] = with_defaults(side["model"], "model")
    # Keys that are new since: differences() tells.
    keys = [(group, key) for group in ("model", "attention", "tokenizer") for key in stored[group]]
    for group, key in [*keys, ("optimizer", "name")]:
        before, now = stored[group][key], config[group].get(key)
        if before != now:
            raise ValueError(
                f"{group}.{key} is {now}, but the run in {folder} was started with {before}; "
                "set it back, or give this run another name=…"
            )


def check_same_data(folder: Path, fingerprint: str) -> None:
    """Raise ValueError if the run in `folder` was trained on data with another fingerprint."""
    found = newest_checkpoint(folder)
    if found and read_state(found).data != fingerprint:
        raise ValueError(
            f"The training data differs from that of {found} (its tokens or its tokenizer); restore "
            "it, or start a new run with another name=…"
        )


def differences(checkpoint: Path, config: dict, code: str) -> list[str]:
    """What a resumed run does otherwise than the checkpoint's, a line each."""
    before, now = _flat(yaml.safe_load((checkpoint / CONFIG).read_text())), _flat(config)
    lines = [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key != "train.resume"
    ]
    if (stored := read_state(checkpoint).code) != code:
        lines.append(f"the source files were {stored}, are {code}")
    return lines


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


class Checkpoints:
    """Writes the checkpoints of one run and keeps the newest `keep`, and those at multiples of
    keep_every steps for good. In the background, writing goes on while the next steps train."""

    def __init__(self, folder: Path, keep: int, keep_every: int | None, background: bool):
        self.folder, self.keep, self.keep_every = folder / "checkpoints", keep, keep_every
        self.background, self.writer, self.error = background, None, None
        if dist.get_rank() == 0:
            for left in self.folder.glob("incomplete_*"):  # by a run that was killed
                shutil.rmtree(left)

    def save(self, engine: Engine, state: TrainState, config: dict, tokenizer: Tokenizer) -> Path:
        """Write checkpoints/step_<n>; if it is there, its state.json. All ranks call it.

        Raises OSError with one sentence when the disk has no room; what was saved before stays.
        """
        self.wait()
        final = self.folder / f"step_{state.step:08d}"
        whole = [(final / STATE).exists()]
        dist.broadcast_object_list(whole, src=0)  # rank 0 writes it last, and knows
        if whole[0]:  # the run stands where it was saved
            if dist.get_rank() == 0:
                _write_state(final, state)
            return final
        shard, num_shards = _shard(engine), _num_shards(engine)
        weights = engine.weights()
        if self.background:
            weights = {k: w.detach().to("cpu", copy=True) for k, w in weights.items()}
        building = final.with_name("incomplete_" + final.name)
        problem = [None]
        if dist.get_rank() == 0:
            problem = [_make_room(building, _size(shard) * num_shards + _size(weights))]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise OSError(problem[0])
        names = [building / _shard_name(i, num_shards) for i in range(num_shards)]
        mine = names[dist.get_rank()] if dist.get_rank() < num_shards else None
        rest = building, final, weights, TrainState(**asdict(state)), config, tokenizer
        if self.background:
            work = names, mine, shard, rest
            self.writer = threading.Thread(target=self._write_all, args=work, daemon=True)
            self.writer.start()
        else:
            self._write_shard(final, mine, shard)
            dist.barrier()  # fails at once if a rank has ended
            self._complete(*rest)
        return final

    def wait(self) -> None:
        """Until what was begun is written; raises what went wrong there."""
        if self.writer:
            self.writer.join()
            self.writer = None
        if self.error:
            raise self.error

    def _write_all(self, names: list[Path], mine: Path | None, shard: dict, rest: tuple) -> None:
        """In a thread, where no collective may run: rank 0 looks for the others' files."""
        try:
            self._write_shard(rest[1], mine, shard)
            if dist.get_rank() == 0:
                _wait_for(names)
            self._complete(*rest)
        except OSError as error:
            self.error = error

    def _write_shard(self, final: Path, path: Path | None, shard: dict) -> None:
        if path:
            with _named(final):
                save_file(shard, path.with_suffix(".part"))
                _flush(path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)

    def _complete(self, building: Path, final: Path, weights, state, config, tokenizer) -> None:
        """Rank 0, when all pieces are there: the rest, and the name that makes it a checkpoint."""
        if dist.get_rank() == 0:
            with _named(final):
                save_weights(building, weights, config, tokenizer)
                _write_state(building, state)
                for path in building.iterdir():
                    _flush(path)
                building.rename(final)
                _flush(final.parent)
                self._prune()

    def _prune(self) -> None:
        whole = sorted(path.parent for path in self.folder.glob(f"step_*/{STATE}"))
        for old in whole[: -self.keep]:
            if not self.keep_every or int(old.name.rpartition("_")[2]) % self.keep_every:
                shutil.rmtree(old)


@contextlib.contextmanager
def _named(final: Path) -> Iterator[None]:
    """What goes wrong in writing, as an OSError in one sentence."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"The checkpoint {final.name} could not be written ({error}). The one before is whole: "
            "make room and continue with train.resume=true."
        ) from None


def _write_state(checkpoint: Path, state: TrainState) -> None:
    """In one go, since it may replace one."""
    new = checkpoint / f"{STATE}.part"
    new.write_text(json.dumps(asdict(state)))
    _flush(new)
    new.rename(checkpoint / STATE)


def _shard_name(rank: int, num_shards: int) -> str:
    return f"optimizer_{rank:05d}_of_{num_shards:05d}.safetensors"


def _num_shards(engine: Engine) -> int:
    """Under ZeRO-0 every rank holds the same, and rank 0 writes it."""
    return 1 if engine.stage == 0 else dist.get_world_size()


def _shard(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's pieces as flat tensors on the CPU; the key says what, of which parameter, where."""
    shard = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        shard["rng/cuda"] = torch.cuda.get_rng_state()
    for piece in pieces(engine.deepspeed):
        tensors = {"master": piece.flat, **piece.state}
        for what, tensor in tensors.items():
            if torch.is_tensor(tensor) and tensor.shape == piece.flat.shape:
                part = tensor.detach().view(-1)[piece.offset : piece.offset + piece.numel]
                shard[f"{what}/{piece.name}/{piece.start}"] = part.to("cpu", copy=True)
    return shard


def _size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _make_room(building: Path, need: int) -> str | None:
    """A fresh folder, or the reason why there is none."""
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        free = shutil.disk_usage(building).free
    except OSError as error:
        return f"No checkpoint can be written: {error}."
    if free < need:
        return (
            f"A checkpoint needs {need / 1e9:.2f} GB and the disk of {building.parent} has "
            f"{free / 1e9:.2f} GB left. Make room and continue with train.resume=true."
        )
    return None


def _flush(path: Path) -> None:
    """Onto the disk, so that a rename never overtakes what it renames."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _wait_for(paths: list[Path]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            raise TimeoutError(f"other ranks did not write theirs within {PATIENCE} s")
        time.sleep(0.02)


@torch.no_grad()
def load_checkpoint(path: Path, engine: Engine) -> TrainState:
    """Put a checkpoint into the engine, whatever ranks and ZeRO stage wrote it; all ranks call it.

    Returns the loop's state.
    """
    state = read_state(path)
    files = [safe_open(file, framework="pt") for file in sorted(path.glob("optimizer_*"))]
    stored = defaultdict(list)  # parameter -> (what, first element, file, key)
    for file in files:
        for key in file.keys():
            what, name, *start = key.split("/")
            if start:
                stored[name].append((what, int(start[0]), file, key))
    # Under ZeRO-1 and 2 one flat tensor holds many parameters, and its state comes with the first.
    for piece in pieces(engine.deepspeed):
        for what, start, file, key in stored[piece.name]:
            _copy_overlap(piece, what, start, file.get_slice(key))
        if "exp_avg" in piece.state:
            on = piece.flat.device if piece.flat.is_cuda else "cpu"
            piece.state["step"] = torch.tensor(float(state.updates), device=on)
    refresh(engine.deepspeed)
    if len(files) == _num_shards(engine):
        own = files[dist.get_rank() if len(files) > 1 else 0]
        torch.set_rng_state(own.get_tensor("rng/cpu"))
        if torch.cuda.is_available() and "rng/cuda" in own.keys():
            torch.cuda.set_rng_state(own.get_tensor("rng/cuda"))
    return state


def _copy_overlap(piece: Piece, what: str, start: int, stored) -> None:
    """Elements of the stored slice that fall into the piece."""
    if what != "master" and what not in piece.state:
        piece.state[what] = torch.zeros_like(piece.flat)
    flat = piece.flat if what == "master" else piece.state[what]
    low = max(start, piece.start)
    high = min(start + stored.get_shape()[0], piece.start + piece.numel)
    if low < high:
        shift = piece.offset - piece.start
        values = stored[low - start : high - start]
        flat.detach().view(-1)[shift + low : shift + high] = values.to(flat.device)
