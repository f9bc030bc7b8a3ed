"""The decoder: a pre-norm GPT whose attention is a choice.

RMSNorm, rotary positions (YaRN on request), grouped-query attention with QK-norm, an optional output
gate and an optional short convolution on keys and values, SwiGLU, tied or untied embeddings, optional
logit soft-cap and z-loss. Tokens are packed: one flat dimension T, documents delimited by cu_seqlens,
no attention across them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import kernels.dense  # noqa: F401  registers nsa::window
import kernels.nsa.ops  # noqa: F401  registers nsa::attention
from model.attention.base import Attention
from model.attention.full import FullAttention
from model.attention.short_conv import ShortConv
from model.cache import Cache, LayerCache
from model.layers import Rope, Rotary, SwiGLU
from model.loss import Loss, linear_cross_entropy
from model.parallel import HeadExchange, check_heads


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); and the attention's lesson."""

    def __init__(self, dim: int, ffn_dim: int, attention: Attention, norm_eps: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, norm_eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(dim, norm_eps)
        self.feed_forward = SwiGLU(dim, ffn_dim)
        self.recompute = "none"  # in the backward pass: none, full, selective (all but attention)

    def forward(
        self, x: Tensor, rope: Rope, cu_seqlens: Tensor, max_seqlen: int, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None]:
        inputs = x, rope, cu_seqlens, max_seqlen, cache
        if self.recompute == "none" or not self.training:
            return self.run(*inputs)
        contexts = {"context_fn": _keep_attention} if self.recompute == "selective" else {}
        return checkpoint(self.run, *inputs, use_reentrant=False, **contexts)

    def run(self, x, rope, cu_seqlens, max_seqlen, cache) -> tuple[Tensor, Tensor | None]:
        attended, lesson = self.attention(
            self.attention_norm(x), rope, cu_seqlens, max_seqlen, cache
        )
        x = x + attended
        return x + self.feed_forward(self.ffn_norm(x)), lesson


# Outputs of the operators that cost the most to compute again, for what they take to keep.
ATTENTION_OPS = {
    torch.ops.nsa.attention.default,
    torch.ops.nsa.window.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}


def _keep_attention():
    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        keep = op in ATTENTION_OPS
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Decoder(nn.Module):
    """Token numbers to logits, or to the loss.

    attention(dim=…, num_heads=…, num_kv_heads=…, head_dim=…, qk_norm=…, output_gate=…, norm_eps=…,
    kv_conv=…) builds one layer's attention; the layers full_layers, counted from 0, have full attention
    instead. head_dim defaults to dim // num_heads. Raises ValueError when sizes do not fit together.
    """

    def __init__(
        self,
        vocab_size: int,
        attention: Callable[..., Attention],
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        ffn_dim: int,
        head_dim: int | None = None,
        qk_norm: bool = True,
        output_gate: bool = True,
        kv_conv: int = 0,
        full_layers: Sequence[int] = (),
        tie_embeddings: bool = True,
        norm_eps: float = 1e-6,
        rope_base: float = 10000.0,
        rope_fraction: float = 1.0,
        yarn_factor: float = 1.0,
        yarn_original_length: int = 8192,
        logit_softcap: float = 0.0,
        z_loss: float = 0.0,
    ):
        super().__init__()
        sizes = dict(
            dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
            ffn_dim=ffn_dim, head_dim=head_dim,
        )  # fmt: skip
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"model.{name}={size}; it must be at least 1.")
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    f"model.dim={dim} does not divide into model.num_heads={num_heads}; choose "
                    "another number of heads or set model.head_dim."
                )
            head_dim = dim // num_heads
        if outside := [i for i in full_layers if not 0 <= i < num_layers]:
            raise ValueError(
                f"model.full_layers: there is no layer {outside[0]}; they are 0 to {num_layers - 1}."
            )
        self.logit_softcap, self.z_loss = logit_softcap, z_loss
        self.answer_share = 0.0  # of answers in the training objective
        self.embedding = nn.Embedding(vocab_size, dim)
        self.rotary = Rotary(head_dim, rope_base, rope_fraction, yarn_factor, yarn_original_length)
        shared = dict(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, qk_norm=qk_norm,
            output_gate=output_gate, norm_eps=norm_eps, kv_conv=kv_conv,
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            Block(
                dim,
                ffn_dim,
                (FullAttention if i in full_layers else attention)(dim=dim, **shared),
                norm_eps,
            )
            for i in range(num_layers)
        )
        self.norm = nn.RMSNorm(dim, norm_eps)
        self.head = None if tie_embeddings else nn.Linear(dim, vocab_size, bias=False)
        self.init_weights()
        # That a token is multiplied with; counted now, as ZeRO-3 will leave empty weights here.
        self.matrix_weights = 0.0 if self.head is not None else self.embedding.weight.numel()
        for module in self.modules():
            if isinstance(module, (nn.Linear, ShortConv)):
                self.matrix_weights += module.weight.numel() * getattr(module, "rows_per_token", 1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embeddings N(0, 0.02); matrices N(0, 1/fan_in), truncated at three deviations.

        Projections that write to the residual stream are smaller by sqrt(2 * layers), so that its
        variance does not grow with depth. Branch gates start at zero (every branch at one half).
        Norms are 1; compression starts as the plain mean, the convolution as the identity.
        """
        residual = (2 * len(self.blocks)) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith(("attention.out_proj", "feed_forward.down_proj")):
                    std *= residual
                if name.endswith("branch_gates"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        targets: Tensor | None = None,
        answers: Tensor | None = None,
    ) -> Tensor | Loss:
        """Logits [T, vocab] in the model's dtype; with targets int64 [T], the loss instead.

        tokens and positions int64 [T], positions restart at each document; cu_seqlens int32
        [documents + 1]; max_seqlen the longest document; answers float32 [T], which weighs targets by
        `answer_share` (linear_cross_entropy).
        """
        x, lesson = self.run(tokens, positions, cu_seqlens, max_seqlen)
        if targets is None:
            return self.logits(x)
        head = self.output_weight, targets, self.z_loss, self.logit_softcap
        loss = linear_cross_entropy(x, *head, answers, self.answer_share)
        if lesson is None:
            return loss
        return loss._replace(objective=loss.objective + lesson, lesson=lesson.detach())

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: Cache | None = None,
    ) -> Tensor:
        """Final hidden states [T, dim], normed. With a cache, tokens are each sequence's new ones."""
        return self.run(tokens, positions, cu_seqlens, max_seqlen, cache)[0]

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What `hidden` gives, and the sum of the attentions' lessons, fp32, or None without any."""
        x, rope = self.embedding(tokens), self.rotary(positions)
        lessons = []
        for i, block in enumerate(self.blocks):
            layer = cache.layers[i] if cache else None
            x, lesson = block(x, rope, cu_seqlens, max_seqlen, layer)
            if lesson is not None:
                lessons.append(lesson)
        return self.norm(x), sum(lessons) if lessons else None

    def recompute(self, what: Literal["none", "full", "selective"]) -> None:
        """Activation checkpointing: what a block computes again in the backward pass instead of
        keeping it; selective keeps the attention operators' outputs."""
        for block in self.blocks:
            block.recompute = what

    def select_all(self, on: bool) -> None:
        """Dense warm-up: whether attention that selects takes all there is, in training, from here on."""
        for block in self.blocks:
            block.attention.select_all(on)

    def share_sequences(self, group: ProcessGroup) -> None:
        """Sequence parallelism over the group (model/parallel.py): forward then takes this rank's
        stretch of tokens, positions and targets, and cu_seqlens of the whole."""
        for block in self.blocks:
            attention = block.attention
            check_heads(attention.num_heads, attention.num_kv_heads, group.size())
            attention.exchange = HeadExchange(group)

    @property
    def output_weight(self) -> Tensor:
        """[vocab, dim]"""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., dim] -> logits [..., vocab]."""
        logits = hidden @ self.output_weight.T
        if self.logit_softcap:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits

    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(p.numel() for p in self.parameters())

    def flops(self, lengths: Sequence[int]) -> float:
        """Training operations of a pass over documents of these lengths: 6 per token and matrix weight
        (forward and backward), and 3.5 times the attention's forward (its backward recomputes the
        logits).

        Follows the PaLM convention (arXiv 2204.02311, appendix B) with causal attention counted
        once and only the pairs that the attention design visits.
        """
        attention = sum(block.attention.flops(n) for block in self.blocks for n in lengths)
        return 6.0 * self.matrix_weights * sum(lengths) + 3.5 * attention

    def flops_per_token(self, seq_len: int) -> float:
        """The same per token of one document."""
        return self.flops([seq_len]) / seq_len
