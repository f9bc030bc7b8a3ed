"""Compile every Triton kernel for an H100, on a machine without one: python tests/kernels/compile_all.py

The interpreter runs what the compiler refuses, such as a variable that a loop gives another shape. A
launch here compiles its kernel, down to the machine's code, and runs nothing. Prints the names of all
functions that were launched. One configuration of each, in bf16; the compiler may refuse others.
The Gluon kernels of kernels/nsa are left out: they want the Triton version they were written for.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver


class Hopper:
    """What Triton asks a driver before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


compiled = set()


def compile_only(kernel, grid):
    def call(*args, **options):
        kernel.warmup(*args, grid=grid, **options)
        compiled.add(f"{kernel.fn.__module__}.{kernel.fn.__name__}")

    return call


driver.set_active(Hopper())
JITFunction.__getitem__ = compile_only
# Nothing fills the tensors, and some of them are read as indices.
torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
torch.Tensor.new_empty = torch.Tensor.new_zeros

from kernels import cross_entropy, rotary_triton, short_conv_triton
from kernels.nsa import append_triton, block_logsumexp_triton, decode_triton, ops, pool, selected
from kernels.nsa.geometry import Geometry

TOKENS, HEADS, KV_HEADS, DIM = 256, 8, 2, 64
geometry = Geometry(16, 8, 64, 32, 512, 1, 2)  # attention=nsa_fine
rows = geometry.capacity(TOKENS)
cu_seqlens = torch.tensor([0, 100, TOKENS], dtype=torch.int32)
lengths = torch.tensor([100, 156], dtype=torch.int32)
scale = DIM**-0.5


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def int32(n):
    return torch.zeros(n, dtype=torch.int32)


def attention(max_seqlen=156):
    inputs = [bf16(TOKENS, HEADS, DIM), *(bf16(rows, KV_HEADS, DIM) for _ in range(2))]
    inputs += [*(bf16(TOKENS, KV_HEADS, DIM) for _ in range(4)), bf16(TOKENS, HEADS, 3)]
    for x in inputs:
        x.requires_grad_()
    out, _ = ops.nsa_attention(*inputs, cu_seqlens, max_seqlen, geometry)
    out.sum().backward()


def pooling():
    x, score, position = (
        bf16(TOKENS, KV_HEADS, DIM),
        bf16(TOKENS, KV_HEADS),
        bf16(geometry.compress_block, KV_HEADS),
    )
    y, lse = pool.pool_forward(x, score, position, cu_seqlens, geometry)
    pool.pool_backward(y, x, score, position, y, lse, cu_seqlens, geometry)


def decoding():
    caches = [bf16(2, rows, KV_HEADS, DIM) for _ in range(2)]
    caches += [bf16(2, TOKENS, KV_HEADS, DIM) for _ in range(4)]
    q, gates = bf16(2, HEADS, DIM), bf16(2, HEADS, 3)
    decode_triton.decode_step(q, *caches, gates, lengths, geometry, scale)
    decode_triton.window_step(q, *caches[-2:], lengths, 512, scale)
    tokens, ring = (
        [bf16(2, KV_HEADS, DIM)] * 2,
        [bf16(2, geometry.compress_block, KV_HEADS, DIM)] * 2,
    )
    scores, positions = [bf16(KV_HEADS, DIM)] * 2, [bf16(geometry.compress_block, KV_HEADS)] * 2
    append_triton.append_step(
        ring, tokens, lengths, caches[:2], scores, positions, geometry.compress_stride
    )


def around():
    """The kernels beside the attention."""
    blocks = int32(TOKENS), int32(TOKENS), int32(4), int32(4)
    for dim in (DIM, 128):
        q, k = bf16(TOKENS, HEADS, dim), bf16(TOKENS, KV_HEADS, dim)
        block_logsumexp_triton.forward(q, k, *blocks, 64, scale)
    q = bf16(TOKENS, HEADS, DIM)
    tables = torch.zeros(2, TOKENS, DIM // 2)
    rotary_triton.forward(q, bf16(DIM), *tables, 1e-6)
    rotary_triton.backward(q, q, bf16(DIM), *tables, 1e-6)
    x, weight, positions = bf16(TOKENS, 128), bf16(4, 128), torch.zeros(TOKENS, dtype=torch.int64)
    short_conv_triton.forward(x, weight, positions)
    short_conv_triton.backward(x, x, weight, positions)
    short_conv_triton.step(bf16(2, 128), weight, bf16(2, 3, 128), lengths)
    weights = torch.ones(TOKENS)
    cross_entropy.cross_entropy_(bf16(TOKENS, 512), positions, weights, TOKENS, 1e-4, 0.0, -100)


triton_functions = ops._triton()
ops._backend = lambda q: triton_functions
for part in (attention, pooling, decoding, around):
    part()
selected.LARGEST_WORKSPACE = 0  # another way through the selected branch's gradients
attention(max_seqlen=1 << 16)  # and through those of long documents
print(*sorted(compiled), sep="\n")
