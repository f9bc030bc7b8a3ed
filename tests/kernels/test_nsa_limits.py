"""The operator at its limits on a GPU: memory, a million tokens, wide shapes, and a memory checker."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from kernels.nsa import reference
from kernels.nsa.geometry import Geometry
from kernels.nsa.ops import nsa_attention
from tests.kernels.test_nsa_gpu import error, make, twin

pytestmark = pytest.mark.gpu
NAMES = ("q", "k_cmp", "v_cmp", "k_sel", "v_sel", "k_win", "v_win", "gates")


@pytest.mark.parametrize(
    "heads, kv_heads, dim, value_dim, dtype",
    [
        (64, 4, 192, 128, torch.bfloat16),
        (6, 2, 192, 128, torch.bfloat16),
        (32, 1, 128, 128, torch.bfloat16),
        (24, 2, 128, 128, torch.bfloat16),
        (8, 1, 96, 96, torch.bfloat16),
        (16, 4, 128, 128, torch.float16),
        (12, 3, 64, 64, torch.float16),
    ],
    ids=str,
)
def test_other_head_layouts(heads, kv_heads, dim, value_dim, dtype):
    lengths, geometry = [1200, 1, 0, 29, 700], Geometry()
    tensors, cu_seqlens = make(lengths, heads, kv_heads, dim, geometry, value_dim, dtype)
    out, indices = nsa_attention(*tensors, cu_seqlens, max(lengths), geometry)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, dout)
    want, want_grads = twin(tensors, cu_seqlens, max(lengths), geometry, indices, dout)
    assert error(out, want) < 5e-3
    for name, g, w in zip(NAMES, grads, want_grads, strict=True):
        assert g.isfinite().all() and error(g, w) < 1e-2, name


def test_many_documents_shorter_than_a_block():
    lengths, geometry = [3, 1, 7] * 400, Geometry()
    tensors, cu_seqlens = make(lengths, 16, 4, 64, geometry)
    out, indices = nsa_attention(*tensors, cu_seqlens, 7, geometry)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, dout)
    want, want_grads = twin(tensors, cu_seqlens, 7, geometry, indices, dout)
    assert error(out, want) < 5e-3
    for name, g, w in zip(NAMES, grads, want_grads, strict=True):
        assert error(g, w) < 1e-2 if w.any() else not g.any(), name


def step_memory(heads, kv_heads, dim, tokens):
    """Peak bytes above the inputs over forward and backward."""
    tensors, cu_seqlens = make([tokens], heads, kv_heads, dim, Geometry())
    dout = torch.randn(tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = nsa_attention(*tensors, cu_seqlens, tokens, Geometry())
    torch.autograd.grad(out, tensors, dout)
    return torch.cuda.max_memory_allocated() - before


def test_memory_at_64k_is_bounded_and_linear():
    half, whole = (step_memory(64, 4, 128, tokens) for tokens in (32768, 65536))
    assert whole <= 8e9
    assert whole <= 2.1 * half


def test_a_million_tokens():
    """Offsets pass 2**31; the last queries, alone in the gradient, are held against the twin."""
    tokens, last, geometry = (1 << 20) + 77, 150, Geometry()
    tensors, cu_seqlens = make([tokens], 16, 1, 128, geometry)
    out, indices = nsa_attention(*tensors, cu_seqlens, tokens, geometry)
    dout = torch.zeros_like(out)
    dout[-last:] = torch.randn(last, 16, 128, device="cuda")
    grads = torch.autograd.grad(out, tensors, dout)
    assert all(g.isfinite().all() for g in grads)

    q, kc, vc, ks, vs, kw, vw, gates = (t.detach() for t in tensors)
    q, gates, do = q[-last:].double(), gates[-last:].double(), dout[-last:].double()
    caches = [x.double() for x in (kc, vc, ks, vs, kw, vw)]
    new = torch.tensor([0, last], dtype=torch.int32, device="cuda")
    documents = reference.cached_documents(new, [tokens - last], tokens, len(kc))
    scale, chosen = 128**-0.5, indices[:, -last:]
    tiles = [
        lambda: reference.compressed_tiles(q, documents, geometry),
        lambda: reference.selected_tiles(q, chosen, documents, geometry),
        lambda: reference.window_tiles(q, documents, geometry.window),
    ]
    outs, lses = [], []
    for branch, tile in enumerate(tiles):
        k, v = caches[2 * branch : 2 * branch + 2]
        o, lse = reference.attention_forward(q, k, v, tile(), scale)
        outs.append(o)
        lses.append(lse)
    picks = reference.choose_blocks(q, caches[0], lses[0], documents, geometry, scale)
    assert (picks != chosen).any(-1).float().mean() < 0.02
    assert error(out[-last:], reference.merge_branches(gates, *outs)) < 5e-3
    dgates, lse, delta = reference.gate_backward(do, gates, outs, lses)
    dq = torch.zeros_like(q)
    for branch, tile in enumerate(tiles):
        k, v = caches[2 * branch : 2 * branch + 2]
        dq, dk, dv = reference.attention_backward(
            do, q, k, v, lse[branch], delta[branch], tile(), scale, dq
        )
        assert error(grads[1 + 2 * branch], dk) < 1e-2
        assert error(grads[2 + 2 * branch], dv) < 1e-2
    assert error(grads[0][-last:], dq) < 1e-2 and not grads[0][:-last].any()
    assert error(grads[7][-last:], dgates) < 1e-2


RAGGED_STEP = """
import torch
from kernels.nsa.geometry import Geometry
from kernels.nsa.ops import nsa_attention
from tests.kernels.test_nsa_gpu import make
for heads, kv_heads, dim in ((4, 2, 64), (16, 1, 128)):
    tensors, cu_seqlens = make([65, 0, 1, 200, 31], heads, kv_heads, dim, Geometry())
    out, _ = nsa_attention(*tensors, cu_seqlens, 200, Geometry())
    torch.autograd.grad(out.sum(), tensors)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer")
def test_no_access_out_of_bounds():
    command = ["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-c", RAGGED_STEP]
    # Without the cache every tensor has memory of its own, so that a step outside is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
