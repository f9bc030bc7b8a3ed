"""The gate: three branch outputs become one (Eq. 5), and the way back.

The way there has no kernel of its own: the window branch, the last one, calls `merged` on its rows
while they are in registers.

Gates multiply rows, so the backward needs no gated copies of dO. With o = sum_c g_c o_c and
P_c = exp(S_c - lse_c), a branch's gradients for g_c dO are those for dO with P_c scaled by g_c, and
that scale fits into the statistics: g_c P_c = exp(S_c - (lse_c - log g_c)). The gate's own gradient
is delta_c = sum(dO * o_c), which the branch needs anyway.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, launch, next_power_of_2

LN2 = tl.constexpr(0.6931471805599453)
ROWS = 32  # (token, head) rows of one program


def gate_backward(dout, gates, outs, lses):
    """What the three branches' backwards start from.

    dout [T, H, Dv], gates [T, H, 3] (not negative), outs and lses the branches' o [T, H, Dv] and
    lse [T, H]. Returns dgates [T, H, 3], the gated lse [3, T, H] and delta [3, T, H], both fp32.
    A closed gate gives lse = +inf: the branch's probabilities are zero.
    """
    gates = gates.contiguous()
    dgates = torch.empty_like(gates)
    lse = torch.empty(3, *dout.shape[:2], dtype=torch.float32, device=dout.device)
    delta = torch.empty_like(lse)
    rows, dim = dout.shape[:2].numel(), dout.shape[2]
    if rows:
        launch(
            _gate_backward_kernel, (cdiv(rows, ROWS),),
            dout, gates, *outs, *lses, dgates, lse, delta, rows, DV=dim,
            DV_PAD=next_power_of_2(dim), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return dgates, lse, delta


def row_delta(do, o):
    """sum(dO * O) over Dv in fp32, [T, H]: what a branch without a gate starts from."""
    delta = torch.empty(do.shape[:2], dtype=torch.float32, device=do.device)
    if delta.numel():
        launch(
            _delta_kernel, (cdiv(delta.numel(), ROWS),),
            do, o, delta, delta.numel(), DV=do.shape[2],
            DV_PAD=next_power_of_2(do.shape[2]), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return delta


@triton.jit
def _rows(num_rows, DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows, which of them exist, and their offsets and mask in [rows, DV]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dv = tl.arange(0, DV_PAD)
    valid = row < num_rows
    return row, valid, row[:, None] * DV + dv[None, :], valid[:, None] & (dv < DV)[None, :]


@triton.jit
def load_parts(gates, o_cmp, o_sel, row, valid, at, mask):
    """What `merged` needs beside the window's output, of rows [R] of [T * H] that exist if `valid`.

    at and mask [R, Dv] say where in o_cmp and o_sel.
    """
    gates += row * 3
    return (
        tl.load(gates, mask=valid, other=0.0),
        tl.load(gates + 1, mask=valid, other=0.0),
        tl.load(gates + 2, mask=valid, other=0.0),
        tl.load(o_cmp + at, mask=mask, other=0.0),
        tl.load(o_sel + at, mask=mask, other=0.0),
    )


@triton.jit
def merged(parts, o_win):
    """sum_c g^c * o^c [R, Dv] in fp32; o_win as it is stored, that is rounded."""
    g_cmp, g_sel, g_win, o_cmp, o_sel = parts
    total = 0.0 + g_cmp.to(tl.float32)[:, None] * o_cmp.to(tl.float32)
    total += g_sel.to(tl.float32)[:, None] * o_sel.to(tl.float32)
    return total + g_win.to(tl.float32)[:, None] * o_win.to(tl.float32)


@triton.jit
def _gate_backward_kernel(
    dout, gates, o_cmp, o_sel, o_win, lse_cmp, lse_sel, lse_win, dgates, lse, delta, num_rows,
    DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, valid, at, mask = _rows(num_rows, DV, DV_PAD, ROWS)
    do = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
    for c in tl.static_range(3):
        o = o_cmp if c == 0 else (o_sel if c == 1 else o_win)
        branch_lse = lse_cmp if c == 0 else (lse_sel if c == 1 else lse_win)
        gate = tl.load(gates + row * 3 + c, mask=valid, other=1.0).to(tl.float32)
        branch = tl.load(branch_lse + row, mask=valid, other=0.0)
        is_open = gate > 0.0
        gated = branch - tl.log2(tl.where(is_open, gate, 1.0)) * LN2
        gated = tl.where(is_open, gated, float("inf"))
        row_sum = tl.sum(do * tl.load(o + at, mask=mask, other=0.0).to(tl.float32), 1)
        plane = tl.cast(c, tl.int64) * num_rows
        tl.store(lse + plane + row, gated, mask=valid)
        tl.store(delta + plane + row, row_sum, mask=valid)
        tl.store(dgates + row * 3 + c, row_sum.to(dgates.dtype.element_ty), mask=valid)


@triton.jit
def _delta_kernel(
    do, o, delta, num_rows, DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr
):
    row, valid, at, mask = _rows(num_rows, DV, DV_PAD, ROWS)
    do_tile = tl.load(do + at, mask=mask, other=0.0).to(tl.float32)
    o_tile = tl.load(o + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(do_tile * o_tile, 1), mask=valid)
