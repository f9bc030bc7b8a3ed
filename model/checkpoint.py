"""A checkpoint folder as everybody but the trainer sees it: weights, config, tokenizer.

checkpoints/step_00000100/ holds model.safetensors, config.yaml and tokenizer.json. Loading reads
data only; nothing in the folder is executed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from model.build import build_decoder, with_defaults
from model.decoder import Decoder

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.yaml", "tokenizer.json"


class Checkpoint(NamedTuple):
    model: Decoder
    tokenizer: Tokenizer
    config: dict
    step: int
    path: Path


def save_weights(
    folder: Path, weights: dict[str, torch.Tensor], config: dict, tokenizer: Tokenizer
):
    """Write what load_checkpoint reads; tied weights appear once."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().contiguous().cpu() for name, w in weights.items()}
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    tokenizer.save(str(folder / TOKENIZER))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a run folder.

    Raises FileNotFoundError with one sentence.
    """
    path = Path(path).expanduser()
    if (path / WEIGHTS).exists():
        return path
    found = sorted(path.glob(f"checkpoints/step_*/{WEIGHTS}"))
    if not found:
        raise FileNotFoundError(
            f"{path} is neither a checkpoint (a folder with {WEIGHTS}) nor a run folder with one "
            "under checkpoints/."
        )
    return found[-1].parent


@torch.no_grad()
def init_from(model: Decoder, path: str | Path, tokenizer: Tokenizer) -> str:
    """Give a fresh model the weights of a checkpoint; returns a line that says what came of it.

    Names and shapes must agree, with two exceptions: a branch of NSA that the checkpoint does not
    have starts from its dense keys and values; and where compressed blocks (compression=gated_mean)
    are a whole number of times as long as the checkpoint's, their weights by place are stretched.
    What else is new keeps its initial values. Raises FileNotFoundError or ValueError with one
    sentence.
    """
    folder = find_checkpoint(path)
    if Tokenizer.from_file(str(folder / TOKENIZER)).to_str() != tokenizer.to_str():
        raise ValueError(
            f"{folder} was trained with another tokenizer than this run's data; start with "
            f"tokenizer=file tokenizer.path={folder / TOKENIZER}."
        )
    stored = yaml.safe_load((folder / CONFIG).read_text())["model"]
    if (theirs := with_defaults(stored, "model")["rope_fraction"]) != model.rotary.fraction:
        raise ValueError(
            f"model.rope_fraction is {model.rotary.fraction}, but {theirs} in {folder}; start with "
            f"model.rope_fraction={theirs}."
        )
    weights, found = load_file(folder / WEIGHTS), matching_weights(model, folder)
    for name, (source, factor) in found.items():
        model.get_parameter(name).copy_(weights[source].repeat_interleave(factor, 0))
    fresh = [name for name, _ in model.named_parameters() if name not in found]
    used = {source for source, _ in found.values()}
    unused = [name for name in weights if name not in used]
    longer = max(factor for _, factor in found.values())
    return (
        f"weights of {folder}, {len(used)} of {len(weights)} tensors"
        + (f", compressed blocks {longer} times as long" if longer > 1 else "")
        + (f"; {len(unused)} are not used, such as {unused[0]}" if unused else "")
        + (f"; {len(fresh)} are new, such as {fresh[0]}" if fresh else "")
    )


def matching_weights(
    model: Decoder, folder: Path, vocabulary: bool = True
) -> dict[str, tuple[str, int]]:
    """What init_from takes of a checkpoint: for the names of the model's parameters the name of a tensor
    there, and how often each of its rows is repeated. Reads no weights, and not what depends on the
    vocabulary if that is unknown. Raises ValueError with one sentence.
    """
    found, unknown = {}, () if vocabulary else ("embedding.weight", "head.weight")
    with safe_open(folder / WEIGHTS, "pt") as weights:
        names = set(weights.keys())
        for name, parameter in model.named_parameters():
            branch = re.sub(r"\.(compressed|selected|local)\.", ".kv.", name)
            source = name if name in names else branch
            if source not in names or name in unknown:
                continue
            rows, *rest = weights.get_slice(source).get_shape()
            factor = len(parameter) // rows if name.endswith(".position") else 1
            if [factor * rows, *rest] != list(parameter.shape):
                raise ValueError(
                    f"{name} has the shape {list(parameter.shape)}, but {[rows, *rest]} in {folder}; "
                    "the sizes of the model must be the same, and compressed blocks a whole number "
                    "of times as long."
                )
            found[name] = source, factor
    return found


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Checkpoint:
    """The model in eval mode, its tokenizer, its config and step, from a checkpoint or run folder.

    dtype defaults to that of the stored weights. Raises FileNotFoundError or ValueError with one
    sentence when the folder is incomplete or does not fit the model it describes.
    """
    folder = find_checkpoint(path)
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).exists():
            raise FileNotFoundError(f"The checkpoint {folder} has no {name}.")
    config = yaml.safe_load((folder / CONFIG).read_text())
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text, as in training
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} can't be read: {error}") from None
    vocab_size = len(weights["embedding.weight"]) if "embedding.weight" in weights else 0
    model = build_decoder(config["model"], config["attention"], vocab_size)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / WEIGHTS} does not fit its config: {reason}") from None
    dtype = dtype or next(iter(weights.values())).dtype
    model = model.to(device=device, dtype=dtype).eval()
    _, _, step = folder.name.rpartition("_")
    return Checkpoint(model, tokenizer, config, int(step) if step.isdigit() else 0, folder)
