"""The importance's lesson against a count by hand, and the dense warm-up against all blocks chosen."""

import dataclasses

import pytest
import torch

from kernels.nsa.geometry import Geometry
from model.build import build_decoder
from model.importance import LONGEST, ImportanceTeacher, selection_kl
from tests.model.test_decoder import MODEL, NSA, VOCAB, make_documents, pack

GEOMETRY = Geometry(4, 2, 4, 3, 8, 1, 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_decoder(MODEL, NSA, VOCAB).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def by_hand(q, k_cmp, k_sel, scale):
    """One document, one token and key/value head at a time."""
    total, groups = 0.0, q.shape[1] // k_sel.shape[1]
    for head in range(k_sel.shape[1]):
        for t in range(len(q)):
            free = range(GEOMETRY.num_initial, t // 4 - GEOMETRY.num_local + 1)
            target, importance = torch.zeros(2, len(q) // 4 + 1, dtype=q.dtype)
            for row in q[t, head * groups : (head + 1) * groups]:
                for s, p in enumerate((k_sel[: t + 1, head] @ row * scale).softmax(0)):
                    target[s // 4] += p / groups
                seen = k_cmp[: max(0, (t - 3) // 2 + 1), head]
                for i, p in enumerate((seen @ row * scale).softmax(0)):
                    for s in range(2 * i, 2 * i + 4):
                        importance[s // 4] += p
            if free:
                target, importance = target[list(free)], importance[list(free)]
                mass = target.sum()
                ratio = (target / mass).log() - (importance / importance.sum()).log()
                total += float((target * ratio).sum())
    return total / (len(q) * k_sel.shape[1])


def test_the_lesson_against_a_count_by_hand():
    torch.manual_seed(0)
    lengths = [29, 3, 16]
    cu_seqlens = torch.tensor([0, 29, 32, 48]).int()
    q, k_sel = torch.randn(48, 4, 8).double(), torch.randn(48, 2, 8).double()
    k_cmp = torch.randn(GEOMETRY.capacity(48), 2, 8).double()
    found = selection_kl(q, k_cmp, k_sel, cu_seqlens, 29, GEOMETRY, 0.3)
    rows, expected = GEOMETRY.compressed_offsets(cu_seqlens).tolist(), 0.0
    for i, n in enumerate(lengths):
        own = slice(cu_seqlens[i], cu_seqlens[i + 1])
        expected += by_hand(q[own], k_cmp[rows[i] :], k_sel[own], 0.3) * n / 48
    assert float(found) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="at most 8,192 tokens, not 8,193"):
        selection_kl(q, k_cmp, k_sel, cu_seqlens, LONGEST + 1, GEOMETRY, 0.3)


def test_only_what_makes_the_importance_learns_from_it(model):
    documents = make_documents([64, 50])
    with ImportanceTeacher() as teacher:
        model(*pack(documents))
    teacher.loss.backward()
    attention = model.blocks[-1].attention
    assert attention.compressed.k_proj.weight.grad.any() and attention.compress_k.score.grad.any()
    assert attention.selected.k_proj.weight.grad is None
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(10):
        with ImportanceTeacher() as teacher:
            model(*pack(documents))
        optimizer.zero_grad()
        teacher.loss.backward()
        optimizer.step()
        losses.append(float(teacher.loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_warm_up_is_as_if_all_blocks_were_chosen(model):
    documents = make_documents()
    inputs = pack(documents)
    with ImportanceTeacher(dense=True, learn=False) as teacher:
        dense = model(*inputs, targets=torch.cat(documents)).objective
    assert teacher.loss == 0.0
    gradients = torch.autograd.grad(dense, [*model.parameters()])
    for block in model.blocks:
        attention = block.attention
        attention.geometry = dataclasses.replace(attention.geometry, num_selected=8)
    everything = model(*inputs, targets=torch.cat(documents)).objective
    expected = torch.autograd.grad(everything, [*model.parameters()])
    torch.testing.assert_close(dense, everything)
    for found, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)
