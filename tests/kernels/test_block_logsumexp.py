"""Attention to blocks: the twin and the kernel against a loop, over packed documents."""

import pytest
import torch

from kernels.nsa import block_logsumexp_triton
from kernels.nsa.block_logsumexp import LOW, block_logsumexp, twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(size, dim, dtype, borders=(0, 70, 73, 123), rows=None):
    """Documents of 70, 3 and 50 tokens cut into blocks, and three unused ones; 19 queries
    unless their rows are given."""
    torch.manual_seed(0)
    blocks = [
        (first, min(first + size, end))
        for begin, end in zip(borders, borders[1:], strict=False)
        for first in range(begin, end, size)
    ]
    firsts, ends = torch.tensor([*blocks, *[(123, 123)] * 3], dtype=torch.int32, device=DEVICE).T
    rows = torch.randperm(123)[:19].sort().values if rows is None else rows
    rows = rows.int().to(DEVICE)
    document = torch.bucketize(rows, torch.tensor(borders[1:], device=DEVICE), right=True)
    begins = torch.tensor(borders, dtype=torch.int32, device=DEVICE)[document]
    q = torch.randn(len(rows), 6, dim, device=DEVICE, dtype=dtype)
    k = torch.randn(123, 2, dim, device=DEVICE, dtype=dtype)
    return q, k, rows, begins, firsts.contiguous(), ends.contiguous(), size, 0.3


@pytest.mark.parametrize("size, dim", [(8, 8), (16, 24), (64, 64)])
def test_against_a_loop(size, dim, monkeypatch):
    inputs = make(size, dim, torch.float32)
    q, k, rows, begins, firsts, ends, _, scale = inputs
    expected = torch.full((6, 19, len(firsts)), LOW, device=DEVICE)
    for r, (row, begin) in enumerate(zip(rows.tolist(), begins.tolist(), strict=True)):
        for b, (first, end) in enumerate(zip(firsts.tolist(), ends.tolist(), strict=True)):
            if seen := [t for t in range(first, end) if begin <= t <= row]:
                for head in range(6):
                    scores = k[seen, head // 3] @ q[r, head] * scale
                    expected[head, r, b] = scores.logsumexp(0)
    torch.testing.assert_close(block_logsumexp(*inputs), expected)
    torch.testing.assert_close(block_logsumexp_triton.forward(*inputs), expected)
    monkeypatch.setattr("kernels.nsa.block_logsumexp.CHUNK_SCORES", 2 * 6 * 19 * size)
    torch.testing.assert_close(twin(*inputs), expected)


@pytest.mark.parametrize("first", [1, 6, 10, 14])
def test_programs_that_begin_and_end_at_borders(first, monkeypatch):
    """A program of 16 queries ends at the first token of a block, begins with a document of one token,
    begins before a block's last token, or goes from one document to the next."""
    monkeypatch.setattr(block_logsumexp_triton, "QUERIES", 16)
    monkeypatch.setattr(block_logsumexp_triton, "BLOCKS", 4)
    inputs = make(16, 16, torch.float32, (0, 70, 71, 123), torch.arange(first, 123))
    torch.testing.assert_close(block_logsumexp_triton.forward(*inputs), twin(*inputs))


def test_its_registration():
    torch.library.opcheck(block_logsumexp, make(16, 24, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 192])
def test_the_kernel_in_bf16(dim):
    inputs = make(64, dim, torch.bfloat16)
    wide = [x.float() if x.is_floating_point() else x for x in inputs[:6]]
    torch.testing.assert_close(
        block_logsumexp(*inputs), twin(*wide, *inputs[6:]), rtol=1e-2, atol=1e-2
    )
