"""Cross-entropy of a block of logits and its gradient in one kernel, in place.

Plain torch passes over the logits a dozen times in fp32; here a row is read twice, the second time
mostly from cache, and its gradient overwrites it.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import launch, next_power_of_2

COLUMNS = 4096  # of a row that one program holds at a time


def cross_entropy_(
    logits, targets, weights, rows: int, z_loss: float, softcap: float, ignored: int
):
    """Turn logits [R, vocab] into the gradient of sum(weights * nll + z_loss * lse^2) / rows, in place.

    targets int64 [R], `ignored` where a row is not scored: its gradient is zero. weights fp32 [R].
    Arithmetic is fp32. Returns nll and lse^2 of every row, fp32 [R], zero where not scored. With
    softcap > 0 the logits are squashed to softcap * tanh(logits / softcap) first.
    """
    nll, z = torch.zeros(2, len(logits), dtype=torch.float32, device=logits.device).unbind()
    if len(logits):
        launch(
            _kernel, (len(logits),),
            logits, targets, weights, nll, z, logits.shape[1], rows, z_loss, softcap, ignored,
            SOFTCAP=softcap > 0,
            COLUMNS=min(COLUMNS, next_power_of_2(logits.shape[1])), num_warps=8,
        )  # fmt: skip
    return nll, z


@triton.jit
def _load(row, column, vocab, fill, softcap, SOFTCAP: tl.constexpr):
    x = tl.load(row + column, mask=column < vocab, other=0.0).to(tl.float32)
    if SOFTCAP:
        x = softcap * (
            2.0 / (1.0 + tl.exp(-2.0 * x / softcap)) - 1.0
        )  # softcap * tanh(x / softcap)
    return tl.where(column < vocab, x, fill)


@triton.jit
def _kernel(
    logits, targets, weights, nll, z, vocab, rows, z_loss, softcap, ignored,
    SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab
    target = tl.load(targets + row)
    lane = tl.arange(0, COLUMNS)
    scored = target != ignored
    peak, total = float("-inf"), 0.0
    if scored:
        for first in range(0, vocab, COLUMNS):
            x = _load(logits, first + lane, vocab, float("-inf"), softcap, SOFTCAP)
            new_peak = tl.maximum(peak, tl.max(x, 0))
            total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(x - new_peak), 0)
            peak = new_peak
        lse = peak + tl.log(total)
        weight = tl.load(weights + row)
        own = _load(logits, target + tl.arange(0, 1), vocab, 0.0, softcap, SOFTCAP)
        tl.store(nll + row + tl.arange(0, 1), lse - own)
        tl.store(z + row, lse * lse)
        # Every lane must have read the target's logit before the row is overwritten.
        tl.debug_barrier()
        for first in range(0, vocab, COLUMNS):
            column = first + lane
            x = _load(logits, column, vocab, 0.0, softcap, SOFTCAP)
            grad = tl.exp(x - lse) * (weight + 2.0 * z_loss * lse)
            grad = tl.where(column == target, grad - weight, grad) / rows
            if SOFTCAP:
                grad *= 1.0 - (x / softcap) * (x / softcap)
            tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=column < vocab)
    else:
        for first in range(0, vocab, COLUMNS):
            zero = tl.zeros([COLUMNS], logits.dtype.element_ty)
            tl.store(logits + first + lane, zero, mask=first + lane < vocab)
