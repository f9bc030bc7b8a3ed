"""Evaluation while training goes on, on weights that training has lent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from eval.needle import metrics, open_haystack, run_needle
from eval.needle_samples import NeedleSettings
from model.build import build_decoder
from model.checkpoint import Checkpoint


def check_needle_in_training(
    config: dict, tokenizer: Tokenizer, settings: NeedleSettings, folder: Path
) -> None:
    """Raises ValueError or FileNotFoundError, in one sentence, for what needle_in_training would
    refuse; config holds data_path, as a checkpoint's does."""
    if settings.during.every_tokens:
        untrained = Checkpoint(None, tokenizer, config, 0, folder)  # its model is not asked for
        open_haystack(untrained, settings.in_training)


def needle_in_training(
    weights: Mapping[str, Tensor], config: dict, tokenizer: Tokenizer, settings: NeedleSettings,
    folder: Path, step: int, device: torch.device, say: Callable[[str], None] = print,
) -> tuple[dict[str, float], Path]:  # fmt: skip
    """Measure settings.in_training; returns accuracies under flat names, and the heatmap's path.

    weights are the whole model's. A second decoder is built around them, so that nothing of the one
    in training is touched: no mode, gradient, hook, compiled graph or random state. On the device
    they are read where they lie, and copied otherwise. Writes eval/needle/step_<step>.json, .csv and
    .png in the run's folder, as eval/needle.py does.
    """
    with torch.random.fork_rng(devices=[]):  # its own first weights, soon replaced, are random
        model = build_decoder(
            config["model"], config["attention"], len(weights["embedding.weight"])
        )
    lent = {name: weight.detach().to(device) for name, weight in weights.items()}
    model.load_state_dict(lent, assign=True)
    model.to(device).eval()
    path = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint = Checkpoint(model, tokenizer, config, step, path)
    results = run_needle(checkpoint, settings.in_training, say=say)
    return metrics(results), folder / "eval" / "needle" / f"{path.name}.png"
