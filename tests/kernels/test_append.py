"""The cache writes of a decode step, token by token, against the pool over whole sequences."""

import pytest
import torch

from kernels.nsa import append as op
from kernels.nsa import append_triton
from kernels.nsa.append import append
from kernels.nsa.compress import gated_pool
from kernels.nsa.geometry import Geometry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNTOUCHED = -7.0


def kernel(*args):
    """The Triton kernel on any device: in the interpreter on a CPU."""
    *lists, stride = args
    append_triton.append_step(*lists, stride)


def make(batch, tokens, heads, dim, geometry, dtype):
    """Caches as of a layer with NSA (rings of keys and values, then four of all tokens), what goes
    into them [6, tokens, B, Hkv, D], compressed rows, scores and positions."""
    torch.manual_seed(0)
    length, rows = geometry.compress_block, geometry.capacity(tokens)
    sizes = [length, length, tokens, tokens, tokens, tokens]

    def filled(*shape):
        return torch.full(shape, UNTOUCHED, device=DEVICE, dtype=dtype)

    def random(*shape):
        return torch.randn(shape, device=DEVICE).to(dtype)

    caches = [filled(batch, n, heads, dim) for n in sizes]
    compressed = [filled(batch, rows, heads, dim) for _ in "kv"]
    scores = [random(heads, dim) * dim**-0.5 for _ in "kv"]
    positions = [random(length, heads) for _ in "kv"]
    return caches, random(6, tokens, batch, heads, dim), compressed, scores, positions


def pooled(x, score, position, geometry):
    """The pool over one sequence [n, Hkv, D] in float64, from scores rounded as in training."""
    cu_seqlens = torch.tensor([0, len(x)], dtype=torch.int32)
    x, score, position = x.cpu(), score.cpu(), position.cpu()
    logits = (x.double() * score).sum(-1).to(x.dtype).double()
    rows = gated_pool(x.double(), logits, position.double(), cu_seqlens, geometry)
    return rows[: geometry.num_compressed(len(x))]


@pytest.mark.parametrize("step", [kernel, append], ids=["kernel", "operator"])
@pytest.mark.parametrize(
    "length, stride, heads, dim, dtype",
    [
        (8, 4, 2, 64, torch.float32),
        (32, 16, 1, 96, torch.float32),
        (32, 16, 3, 128, torch.float16),
        (4, 4, 2, 8, torch.float32),
        (6, 2, 1, 24, torch.float16),
        (1, 1, 2, 16, torch.float32),
    ],
    ids=str,
)
def test_sequences_that_grow_by_a_token(step, length, stride, heads, dim, dtype):
    """Each from empty over several blocks' borders, and one that stands behind the others."""
    geometry = Geometry(length, stride, 2 * stride, 3, 4)
    tokens, late = 2 * length + stride + 3, length + 1
    caches, new, compressed, scores, positions = make(2, tokens, heads, dim, geometry, dtype)
    for t in range(tokens):
        # The second sequence gets nothing until the first has `late` tokens.
        lengths = torch.tensor([t + 1, max(t + 1 - late, 0)], dtype=torch.int32, device=DEVICE)
        step(caches, [x[t] for x in new], lengths, compressed, scores, positions, stride)
    for b, start in enumerate((0, late)):
        count = tokens - start
        for cache, x in zip(caches[2:], new[2:, start:, b], strict=True):
            assert torch.equal(cache[b, :count], x) and (cache[b, count:] == UNTOUCHED).all()
        for ring, x in zip(caches[:2], new[:2, start:, b], strict=True):
            for t in range(max(count - length, 0), count):
                assert torch.equal(ring[b, t % length], x[t])
        for i, rows in enumerate(compressed):
            want = pooled(new[i, start:, b], scores[i], positions[i], geometry)
            tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(
                rtol=4e-3, atol=4e-3
            )  # fmt: skip
            torch.testing.assert_close(rows[b, : len(want)].double().cpu(), want, **tolerance)
            assert (rows[b, len(want) :] == UNTOUCHED).all()


@pytest.mark.parametrize("step", [kernel, append], ids=["kernel", "operator"])
def test_without_blocks(step):
    caches, new, *_ = make(3, 5, 2, 8, Geometry(4, 2, 4, 3, 4), torch.float32)
    before = [cache.clone() for cache in caches]
    lengths = torch.tensor([5, 0, 2], dtype=torch.int32, device=DEVICE)
    step(caches[1:3], list(new[:2, 0]), lengths, [], [], [], 1)
    before[1][0, 0], before[1][2, 1] = new[0, 0, 0], new[0, 0, 2]
    before[2][0, 4], before[2][2, 1] = new[1, 0, 0], new[1, 0, 2]
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


def test_what_does_not_fit_is_named():
    caches, new, compressed, scores, positions = make(
        2, 5, 2, 8, Geometry(4, 2, 4, 3, 4), torch.float32
    )
    lengths = torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"tokens\[1\]"):
        append(caches[:2], [new[0, 0], new[1, 0, :1]], lengths)
    with pytest.raises(ValueError, match=r"caches\[1\]"):
        append(caches[1:3], list(new[:2, 0]), lengths, compressed, scores, positions, 2)
    with pytest.raises(ValueError, match="a token for every cache"):
        append(caches, list(new[:2, 0]), lengths)
    with pytest.raises(ValueError, match="contiguous"):
        append(caches[:1], [new[0, 0].transpose(0, 1).contiguous().transpose(0, 1)], lengths)


def test_the_operator_keeps_its_promises():
    caches, new, *rest = make(2, 9, 2, 8, Geometry(4, 2, 4, 3, 4), torch.float32)
    lengths = torch.tensor([9, 4], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(op._append._opoverload, (caches, list(new[:, 0]), lengths, *rest, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_a_captured_step_fills_the_caches_always_the_same(dim):
    geometry, tokens = Geometry(), 100
    results = []
    for _ in range(2):
        caches, new, compressed, scores, positions = make(
            2, tokens, 4, dim, geometry, torch.bfloat16
        )
        lengths = torch.tensor([1, 1], dtype=torch.int32, device=DEVICE)
        fed = [x[0].clone() for x in new]
        inputs = caches, fed, lengths, compressed, scores, positions, geometry.compress_stride
        append(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            append(*inputs)
        for t in range(tokens):
            for x, all_tokens in zip(fed, new, strict=True):
                x.copy_(all_tokens[t])
            lengths.fill_(t + 1)
            graph.replay()
        results.append([*caches, *compressed])
        for i, rows in enumerate(compressed):
            for b in range(2):
                want = pooled(new[i, :, b], scores[i], positions[i], geometry)
                got = rows[b, : len(want)].double().cpu()
                assert (got - want).norm() < 5e-3 * want.norm()
        assert all(
            torch.equal(c[:, :tokens].transpose(0, 1), x)
            for c, x in zip(caches[2:], new[2:], strict=True)
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
