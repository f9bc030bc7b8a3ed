"""Cross-entropy from hidden states, without ever holding all logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # target of a position that is not scored
# Logits held at a time: 512 MB in bf16, so that a GPU rarely passes over the sum of the weight's
# gradient, which each chunk adds to; 16 MB in fp32 stay near a CPU's cache.
CHUNK_LOGITS = {"cuda": 1 << 28, "cpu": 1 << 22}


class Loss(NamedTuple):
    """objective: the scalar to minimise. nll_sum, z_sum, count: fp32 sums over scored positions;
    answer_nll, answer_count: over the answers among them, each counted once. lesson: what the
    objective holds of the attentions' own, weighed."""

    objective: Tensor
    nll_sum: Tensor
    z_sum: Tensor
    count: Tensor
    answer_nll: Tensor
    answer_count: Tensor
    lesson: Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients along with the loss, a chunk of rows at a time.

    With z = softcap(h W^T), L = logsumexp(z) and w the row's weight, d objective_row / dz is
    w (softmax(z) - onehot) + 2 z_loss L softmax(z).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, softcap, answers, answer_share):
        rows, vocab = hidden.shape[0], weight.shape[0]
        need_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dhidden = torch.empty_like(hidden) if need_grad else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=wide) if need_grad else None
        weighed, nll_sum, answer_nll, z_sum = hidden.new_zeros(4, dtype=wide).unbind()
        weights, answering = 1 + answer_share * answers.to(wide), answers > 0
        step = max(CHUNK_LOGITS.get(hidden.device.type, 1 << 22) // vocab, 1)
        for start in range(0, rows, step):
            h, target = hidden[start : start + step], targets[start : start + step]
            logits = h @ weight.T
            nll, z, grad = _backend(logits)(
                logits, target, weights[start : start + step], rows, z_loss, softcap, need_grad
            )
            weighed += (nll * weights[start : start + step]).sum()
            nll_sum += nll.sum()
            answer_nll += (nll * answering[start : start + step]).sum()
            z_sum += z.sum()
            if need_grad:
                dhidden[start : start + step] = grad @ weight
                dweight += grad.T @ h
            del logits, grad  # before the next chunk's are made
        ctx.save_for_backward(dhidden, dweight if dweight is None else dweight.to(weight.dtype))
        objective = (weighed + z_loss * z_sum) / rows
        ctx.mark_non_differentiable(nll_sum, answer_nll, z_sum)
        return objective, nll_sum, answer_nll, z_sum

    @staticmethod
    def backward(ctx, grad, *_):
        dhidden, dweight = ctx.saved_tensors
        return dhidden * grad.to(dhidden.dtype), dweight * grad.to(dweight.dtype), *[None] * 5


def _backend(logits: Tensor):
    """The function that turns logits [R, vocab] into nll [R], z [R] and d objective / d logits."""
    if not logits.is_cuda:
        return _cross_entropy
    from kernels.cross_entropy import cross_entropy_  # needs a working Triton

    return lambda *args: (*cross_entropy_(*args[:-1], IGNORED), logits)


def _cross_entropy(
    logits, targets, weights, rows: int, z_loss: float, softcap: float, need_grad: bool
):
    """What kernels/cross_entropy.py does, in plain torch; fp32 inside."""
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    if softcap:
        squashed = torch.tanh(logits.div_(softcap))
        logits = squashed * softcap
    scored = targets != IGNORED
    target = targets.clamp(min=0)[:, None]
    lse = logits.logsumexp(1)
    nll = (lse - logits.gather(1, target)[:, 0]) * scored
    z = lse.square() * scored
    if not need_grad:
        return nll, z, None
    grad = logits.sub_(lse[:, None]).exp_()  # softmax
    grad.mul_((weights + 2 * z_loss * lse)[:, None])
    grad.scatter_add_(1, target, -weights.to(grad.dtype)[:, None])
    grad.mul_((scored.to(grad.dtype) / rows)[:, None])
    if softcap:
        grad.mul_(1 - squashed.square_())
    return nll, z, grad.to(dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    answers: Tensor | None = None,
    answer_share: float = 0.0,
) -> Loss:
    """Next-token loss of hidden [T, dim] under the output matrix weight [vocab, dim].

    targets int64 [T], IGNORED where not scored. softcap > 0 squashes logits to
    softcap * tanh(logits / softcap); z_loss weighs the squared log-normaliser (arXiv 2204.02311).
    answers float32 [T], above 0 for scored targets that answer a question (data/batch.py): in the
    objective a target weighs 1 + answer_share * answers.
    The objective divides by all T positions, not by the scored ones or their weights: the gradient
    of a batch is then the same however it is cut into micro-batches and ranks.
    """
    if answers is None:
        answers = torch.zeros_like(targets, dtype=torch.float32)
    objective, nll_sum, answer_nll, z_sum = _LinearCrossEntropy.apply(
        hidden, weight, targets, z_loss, softcap, answers, answer_share
    )
    count, answer_count = (targets != IGNORED).sum().float(), (answers > 0).sum().float()
    no_lesson = torch.zeros_like(nll_sum)
    return Loss(objective, nll_sum, z_sum, count, answer_nll, answer_count, no_lesson)
