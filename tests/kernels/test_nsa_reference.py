"""The torch twin against the definition, over random geometries, ragged documents and groups."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.dense  # noqa: F401, registers nsa::window
from kernels.nsa import reference
from kernels.nsa.decode import nsa_decode
from kernels.nsa.geometry import Geometry
from kernels.nsa.ops import nsa_attention
from tests.kernels import oracle


@st.composite
def cases(draw):
    d = draw(st.sampled_from([1, 2, 3, 4]))
    geometry = Geometry(
        compress_block=d * draw(st.integers(1, 3)),
        compress_stride=d,
        select_block=d * draw(st.integers(1, 4)),
        num_selected=draw(st.integers(3, 5)),
        window=draw(st.integers(1, 12)),
        num_initial=draw(st.integers(0, 1)),
        num_local=draw(st.integers(1, 2)),
    )
    lengths = draw(st.lists(st.integers(0, 23), min_size=1, max_size=3))
    if not sum(lengths):
        lengths.append(1)
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    return geometry, lengths, kv_heads, group, draw(st.integers(0, 10**6))


def make_inputs(geometry, lengths, kv_heads, group, seed, dims=(5, 4), dtype=torch.float64):
    torch.manual_seed(seed)
    tokens, heads = sum(lengths), kv_heads * group
    rows = geometry.capacity(tokens)
    shapes = [(tokens, heads, dims[0])]
    for count in (rows, tokens, tokens):
        shapes += [(count, kv_heads, dims[0]), (count, kv_heads, dims[1])]
    tensors = [torch.randn(s, dtype=dtype) for s in shapes]
    gates = torch.rand(tokens, heads, 3, dtype=dtype)
    tensors.append(gates * (torch.rand_like(gates) > 0.2))  # some are closed
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return [x.requires_grad_() for x in tensors], cu_seqlens


@settings(max_examples=40, deadline=None)
@given(cases())
def test_forward_selection_and_gradients_equal_the_definition(case):
    geometry, lengths, kv_heads, group, seed = case
    tensors, cu_seqlens = make_inputs(*case)
    scale = 0.7
    out, indices = nsa_attention(*tensors, cu_seqlens, max(lengths), geometry, scale)
    expected, picks = oracle.nsa(*tensors, cu_seqlens.tolist(), geometry, scale)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)

    by_token = [row for document in picks for row in document]
    for t, row in enumerate(by_token):
        for h, blocks in enumerate(row):
            got = indices[h, t].tolist()
            assert got == sorted(blocks) + [-1] * (geometry.num_selected - len(blocks))

    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, tensors, grad)
    want = torch.autograd.grad(expected, tensors, grad, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-8, atol=1e-9)


def test_long_document_takes_many_tiles_and_agrees_with_one_tile(monkeypatch):
    geometry = Geometry(8, 4, 16, 4, 32)
    tensors, cu_seqlens = make_inputs(geometry, [150, 90], 2, 2, 0)
    whole, _ = nsa_attention(*tensors, cu_seqlens, 150, geometry)
    whole_grads = torch.autograd.grad(whole.sum(), tensors)
    monkeypatch.setattr(reference, "TILE_SCORES", 1 << 11)
    tiled, _ = nsa_attention(*tensors, cu_seqlens, 150, geometry)
    torch.testing.assert_close(tiled, whole, rtol=1e-9, atol=1e-9)
    for g, w in zip(torch.autograd.grad(tiled.sum(), tensors), whole_grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_no_selection_is_as_if_all_blocks_were_chosen():
    lengths, results = [40, 0, 3, 17], []
    for count in (0, 5):  # of 8 tokens
        geometry = Geometry(4, 2, 8, count, 6)
        tensors, cu_seqlens = make_inputs(geometry, lengths, 4, 2, 0)
        out, indices = nsa_attention(*tensors, cu_seqlens, 40, geometry)
        assert indices.shape == (4, 60, count)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(whole, blocks, rtol=1e-9, atol=1e-9)


def test_with_a_cache_blocks_must_be_selected():
    nothing = [torch.zeros(1)] * 9
    for call in (nsa_decode, partial(reference.nsa_cached, past=[0], scale=1.0)):
        with pytest.raises(ValueError, match="num_selected=0 is for training"):
            call(*nothing, geometry=Geometry(num_selected=0))


def test_ties_go_to_the_lower_block():
    geometry = Geometry(4, 4, 4, 4, 4)
    tensors, cu_seqlens = make_inputs(geometry, [40], 1, 1, 0)
    tensors = [torch.zeros_like(x) for x in tensors]
    _, indices = nsa_attention(*tensors, cu_seqlens, 40, geometry)
    assert indices[0, 39].tolist() == [0, 1, 8, 9]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(compress_block=30), "not a multiple"),
        (dict(num_selected=2), "forced blocks"),
        (dict(window=0), "at least 1"),
    ],
)
def test_impossible_geometry_is_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        Geometry(**change)


def test_opcheck_of_the_window():
    q, k, v = (torch.randn(17, heads, 4, requires_grad=True) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 13, 17], dtype=torch.int32)
    torch.library.opcheck(torch.ops.nsa.window, (q, k, v, cu_seqlens, 13, 5, 0.5))


@pytest.mark.parametrize("num_selected", [3, 0])
def test_opcheck_and_flops(num_selected):
    geometry = Geometry(4, 2, 4, num_selected, 4)
    tensors, cu_seqlens = make_inputs(geometry, [13, 4], 2, 2, 1)
    args = (*tensors, cu_seqlens, 13, geometry.numbers(), 0.5)
    torch.library.opcheck(torch.ops.nsa.attention, args)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        out, _ = nsa_attention(*tensors, cu_seqlens, 13, geometry)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert counter.get_total_flops() == forward + forward * 5 // 2
