"""Optimizers and which parameters get what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class AdamWConfig:
    """conf/optimizer/adamw.yaml"""

    lr: float
    betas: list[float]
    eps: float
    weight_decay: float


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Projection matrices, which decay, and the rest: norms, biases, embeddings, and what steers the
    branches of NSA (branch gates, scores and position encodings of the compression)."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and name.endswith("proj.weight") or name == "head.weight"
        (decay if matrix else keep).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: AdamWConfig, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        fused=fused,
    )
