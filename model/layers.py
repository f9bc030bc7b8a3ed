"""Small pieces of the decoder: rotary positions, projections of one input, SwiGLU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import rotary


class Rope(NamedTuple):
    """Where tokens stand: positions int64 [T], their cos and sin fp32 [T, D / 2]."""

    positions: Tensor
    cos: Tensor
    sin: Tensor


class Rotary(nn.Module):
    """Rotary position embedding (arXiv 2104.09864), half-split, with YaRN scaling (2309.00071).

    Of the pairs of dimensions, the slowest 1 - fraction do not turn: they match by content alone, at any
    distance, also one that training never saw (p-RoPE, 2410.06205). A yarn_factor of 1 is plain RoPE.
    With YaRN, frequencies that turn less than `beta_slow` times within the original length are
    interpolated by the factor, those that turn more than `beta_fast` times are kept, and the logits'
    temperature follows YaRN's Eq. 22.
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        fraction: float = 1.0,
        yarn_factor: float = 1.0,
        yarn_original_length: int = 8192,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
    ):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"Rotary positions need an even head dimension, not {head_dim}.")
        if not 0 <= fraction <= 1:
            raise ValueError(f"model.rope_fraction={fraction}; it is a share, from 0 to 1.")
        self.half, self.fraction, self.yarn_factor = head_dim // 2, fraction, yarn_factor
        self.yarn_original_length = yarn_original_length
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        # Kept as bits: a cast of the module to bf16 would round a buffer of fp32.
        bits = torch.zeros(self.half, dtype=torch.int32)
        self.register_buffer("frequency_bits", bits, persistent=False)
        self.set_base(base)

    def set_base(self, base: float) -> None:
        """Positions of another base from here on, as when a run goes on with longer sequences."""
        turning = round(self.fraction * self.half)
        frequencies = [base ** (-i / self.half) * (i < turning) for i in range(self.half)]
        self.magnitude = 1.0
        if self.yarn_factor != 1.0:
            turns = [self.yarn_original_length * f / (2 * math.pi) for f in frequencies]
            span = self.beta_fast - self.beta_slow
            keep = [min(max((t - self.beta_slow) / span, 0.0), 1.0) for t in turns]
            frequencies = [
                f * (k + (1 - k) / self.yarn_factor) for f, k in zip(frequencies, keep, strict=True)
            ]
            self.magnitude = 0.1 * math.log(self.yarn_factor) + 1.0
        self.frequencies = frequencies
        bits = torch.tensor(frequencies, dtype=torch.float32).view(torch.int32)
        self.frequency_bits.copy_(bits)

    def forward(self, positions: Tensor) -> Rope:
        """positions int64 [T], from the first token of each document."""
        angles = positions[:, None].float() * self.frequency_bits.view(torch.float32)
        return Rope(positions, angles.cos() * self.magnitude, angles.sin() * self.magnitude)


class RotaryNorm(nn.Module):
    """RMSNorm of every head of queries or keys, if `norm`, and their rotation by position."""

    def __init__(self, head_dim: int, eps: float, norm: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(head_dim)) if norm else None

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """x [T, heads, D] -> [T, heads, D]"""
        return rotary.norm_rotate(x, self.weight, rope.cos, rope.sin, self.eps)


PROJECTED_AT_ONCE = {"cuda"}  # device types, for compiled code
CACHE_LINE = 64  # bf16 or fp16 numbers


def project(x: Tensor, *layers: nn.Linear | None) -> list[Tensor | None]:
    """What each layer makes of x [..., dim]; None where there is no layer.

    Compiled for a GPU it is one product with all their weights: x is read once, its gradient is
    written once instead of being summed over layers, and a wide product keeps more of the GPU busy.
    The results are then views of one tensor. Elsewhere the layers are called: not compiled, the
    backward pass would have to copy the parts of that tensor's gradient together; and ZeRO-3, which
    is never compiled, gathers a weight when its layer is called.
    """
    there = [layer for layer in layers if layer is not None]
    at_once = torch.compiler.is_compiling() and x.device.type in PROJECTED_AT_ONCE
    # A part that does not begin at a multiple of 16 bytes would slow what reads it down.
    if not at_once or any(type(y) is not nn.Linear or y.out_features % 8 for y in there):
        return [None if layer is None else layer(x) for layer in layers]
    sizes = [layer.out_features for layer in there]
    weights = [layer.weight for layer in there]
    # The compiler pads rows to whole cache lines, and would then copy every part for its reader.
    if spare := -sum(sizes) % CACHE_LINE:
        weights.append(x.new_zeros(spare, x.shape[-1]))
    *parts, _ = F.linear(x, torch.cat(weights)).split([*sizes, spare], -1)
    made = {
        layer: part if layer.bias is None else part + layer.bias
        for layer, part in zip(there, parts, strict=True)
    }
    return [made.get(layer) for layer in layers]


class SwiGLU(nn.Module):
    """Feed-forward layer W_down(silu(W_gate x) * W_up x) (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
