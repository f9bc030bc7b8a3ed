"""What all attention designs share, so that a comparison changes the attention and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.attention.short_conv import ShortConv
from model.cache import LayerCache
from model.layers import Rope, RotaryNorm, project
from model.parallel import HeadExchange


class Attention(nn.Module, ABC):
    """Projections, QK-norm, rotary positions and output gate.

    A design subclasses this, makes its branches by `key_value`, and says in `attend` how queries
    meet their keys and values. num_heads query heads share num_kv_heads key/value heads (GQA). The
    optional output gate multiplies each head's output elementwise by a sigmoid of the input
    (arXiv 2505.06708). kv_conv > 0 convolves keys and values over that many tokens (short_conv.py).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: bool,
        output_gate: bool,
        norm_eps: float,
        kv_conv: int,
    ):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"model.num_heads={num_heads} is not a multiple of model.num_kv_heads="
                f"{num_kv_heads}: every key/value head serves an equal group of query heads."
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qk_norm, self.norm_eps, self.kv_conv = qk_norm, norm_eps, kv_conv
        self.scale = head_dim**-0.5
        self.exchange: HeadExchange | None = None  # set under sequence parallelism
        self.branch_gates: nn.Linear | None = None  # a design with several branches may have one
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.q_norm = RotaryNorm(head_dim, norm_eps, qk_norm)
        self.gate_proj = nn.Linear(dim, num_heads * head_dim, bias=False) if output_gate else None
        self.out_proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def key_value(self, dim: int) -> KeyValue:
        """A fresh pair of key and value projections with this layer's heads."""
        return KeyValue(
            dim, self.num_kv_heads, self.head_dim, self.qk_norm, self.norm_eps, self.kv_conv
        )

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, dim] -> [T, dim] over packed documents, and the lesson of `attend`.

        With a cache, x holds only the new tokens of each sequence and the cache the earlier ones.
        """
        branches = {n: m for n, m in self.named_children() if isinstance(m, KeyValue)}
        pairs = (layer for kv in branches.values() for layer in (kv.k_proj, kv.v_proj))
        q, branch_gates, *projected, gate = project(
            x, self.q_proj, self.branch_gates, *pairs, self.gate_proj
        )
        q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim)), rope)
        keys_values = [
            kv(k, v, rope, cu_seqlens, cache, self.exchange, name)
            for (name, kv), k, v in zip(
                branches.items(), projected[::2], projected[1::2], strict=True
            )
        ]
        out, lesson = self.attend(q, keys_values, branch_gates, cu_seqlens, max_seqlen, cache), None
        if isinstance(out, tuple):
            out, lesson = out
        out = out.flatten(1)
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return self.out_proj(out), lesson

    def to_heads(self, *tensors: Tensor) -> Sequence[Tensor]:
        """[tokens, heads, D] each, contiguous, as kernels read them: under sequence parallelism all
        tokens of this rank's heads."""
        if self.exchange is None:
            return [x.contiguous() for x in tensors]
        return self.exchange.to_heads(*tensors)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back, for the attention's output."""
        return x if self.exchange is None else self.exchange.to_tokens(x)

    def select_all(self, on: bool) -> None:
        """As Decoder.select_all."""

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        keys_values: list[tuple[Tensor, Tensor]],
        branch_gates: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: LayerCache | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotated queries q [T, H, D], k and v [T, Hkv, D] of every branch, in the order of their
        making, and what `branch_gates` made of the input -> [T, H, D]; in training perhaps with a
        lesson, an fp32 scalar that the loss grows by."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Operations of the attention proper, forward, for one document of `tokens` tokens."""


class KeyValue(nn.Module):
    """Keys (convolved, normed, rotated) and values (convolved) of one branch.

    The norm comes after the convolution, so that keys keep the length it gives them.
    """

    def __init__(
        self, dim: int, num_kv_heads: int, head_dim: int, qk_norm: bool, norm_eps: float,
        kv_conv: int,
    ):  # fmt: skip
        super().__init__()
        self.heads = (num_kv_heads, head_dim)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        convs = (ShortConv(kv_conv, num_kv_heads * head_dim) if kv_conv else None for _ in "kv")
        self.k_conv, self.v_conv = convs
        self.k_norm = RotaryNorm(head_dim, norm_eps, qk_norm)

    def forward(
        self,
        k: Tensor,
        v: Tensor,
        rope: Rope,
        cu_seqlens: Tensor,
        cache: LayerCache | None,
        exchange: HeadExchange | None,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        """What k_proj and v_proj gave, [T, Hkv * D] -> k, v [T, Hkv, D]; `name` is the branch's in the
        cache."""
        if self.k_conv is not None:
            where = rope.positions, cu_seqlens, cache, exchange
            k, v = self.k_conv(k, *where, f"{name}_k"), self.v_conv(v, *where, f"{name}_v")
        k, v = k.unflatten(-1, self.heads), v.unflatten(-1, self.heads)
        return self.k_norm(k, rope), v
