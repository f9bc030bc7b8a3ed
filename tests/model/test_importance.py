"""The importance's lesson against a count by hand, and the dense warm-up against all blocks chosen."""

import dataclasses

import pytest
import torch

from kernels.nsa.geometry import Geometry
from model.build import build_decoder
from model.importance import candidates, selection_kl
from tests.model.test_decoder import MODEL, NSA, VOCAB, make_documents, pack


def make_model(**attention):
    torch.manual_seed(0)
    model = build_decoder(MODEL, NSA | attention, VOCAB).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def by_hand(q, k_cmp, k_sel, geometry, scale):
    """One document, one token and key/value head at a time."""
    total, groups = 0.0, q.shape[1] // k_sel.shape[1]
    length, stride, size = geometry.compress_block, geometry.compress_stride, geometry.select_block
    for head in range(k_sel.shape[1]):
        for t in range(len(q)):
            free = range(geometry.num_initial, t // size - geometry.num_local + 1)
            target, importance = torch.zeros(2, len(q) // size + 1, dtype=q.dtype)
            for row in q[t, head * groups : (head + 1) * groups]:
                for s, p in enumerate((k_sel[: t + 1, head] @ row * scale).softmax(0)):
                    target[s // size] += p / groups
                seen = k_cmp[: max(0, (t + 1 - length) // stride + 1), head]
                for i, p in enumerate((seen @ row * scale).softmax(0)):
                    for s in range(stride * i, stride * i + length):
                        importance[s // size] += p
            if free:
                target, importance = target[list(free)], importance[list(free)]
                mass = target.sum()
                ratio = (target / mass).log() - (importance / importance.sum()).log()
                total += float((target * ratio).sum())
    return total / (len(q) * k_sel.shape[1])


@pytest.mark.parametrize("geometry", [Geometry(4, 2, 4, 3, 8, 1, 1), Geometry(8, 2, 4, 4, 8, 0, 2)])
def test_the_lesson_against_a_count_by_hand(geometry):
    torch.manual_seed(0)
    lengths = [29, 3, 16]
    cu_seqlens = torch.tensor([0, 29, 32, 48]).int()
    q, k_sel = torch.randn(48, 4, 8).double(), torch.randn(48, 2, 8).double()
    k_cmp = torch.randn(geometry.capacity(48), 2, 8).double()
    found = selection_kl(q, k_cmp, k_sel, cu_seqlens, geometry, 0.3, 48)
    rows, expected = geometry.compressed_offsets(cu_seqlens).tolist(), 0.0
    for i, n in enumerate(lengths):
        own = slice(cu_seqlens[i], cu_seqlens[i + 1])
        expected += by_hand(q[own], k_cmp[rows[i] :], k_sel[own], geometry, 0.3) * n / 48
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_taught_are_the_queries_that_pay_most_to_one_block():
    torch.manual_seed(0)
    geometry, cu_seqlens = Geometry(4, 2, 4, 3, 8, 1, 1), torch.tensor([0, 48]).int()
    q, k_sel = torch.randn(48, 4, 8).double(), torch.randn(48, 2, 8).double()
    k_cmp = torch.randn(geometry.capacity(48), 2, 8).double().requires_grad_()
    for head, row in enumerate((30, 40)):  # which only look at block 2, and so most of all
        q[row, 2 * head : 2 * head + 2], k_sel[8, head] = 10.0, 10.0
    q.requires_grad_()
    selection_kl(q, k_cmp, k_sel, cu_seqlens, geometry, 0.3, 1).backward()
    taught = q.grad.unflatten(1, (2, 2)).any(-1).any(-1)
    assert taught.nonzero().tolist() == [[30, 0], [40, 1]]


def test_the_candidates_are_spread():
    rows = candidates(65536, 256, torch.device("cpu"))
    assert torch.equal(rows // 256, torch.arange(256))
    assert (rows % 64).bincount(minlength=64).min() > 0
    assert torch.equal(candidates(5, 256, torch.device("cpu")), torch.arange(5))


def test_the_lesson_is_part_of_the_loss_in_training():
    documents = make_documents([64, 50])
    inputs, targets = pack(documents), torch.cat(documents)
    plain = make_model()(*inputs, targets=targets)
    model = make_model(selection_kl=2.0)
    taught = model(*inputs, targets=targets)
    assert not plain.lesson and taught.lesson > 0 and not taught.lesson.requires_grad
    torch.testing.assert_close(taught.objective, plain.objective + taught.lesson)
    torch.testing.assert_close(taught.nll_sum, plain.nll_sum)
    assert torch.equal(model.eval()(*inputs, targets=targets).objective, plain.objective)
    model.train().recompute("full")
    again = model(*inputs, targets=targets).objective
    weight = model.blocks[0].attention.compress_k.score
    [found] = torch.autograd.grad(again, weight)
    [want] = torch.autograd.grad(taught.objective, weight)
    torch.testing.assert_close(found, want)


def test_only_what_makes_the_importance_learns_from_it():
    model = make_model(selection_kl=1.0)
    inputs = pack(make_documents([64, 50]))
    lessons = []
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(10):
        lesson = model.run(*inputs)[1]
        optimizer.zero_grad()
        lesson.backward()
        optimizer.step()
        lessons.append(float(lesson.detach()))
    assert lessons[-1] < 0.7 * lessons[0]
    attention = model.blocks[-1].attention
    assert attention.compressed.k_proj.weight.grad.any() and attention.compress_k.score.grad.any()
    assert attention.selected.k_proj.weight.grad is None
    with pytest.raises(ValueError, match="attention.selection_kl=-1"):
        make_model(selection_kl=-1)
    with pytest.raises(ValueError, match="attention.taught_queries=0"):
        make_model(taught_queries=0)
    with pytest.raises(ValueError, match="attention.num_selected=0"):
        make_model(num_selected=0)


def test_a_compiled_block_takes_any_number_of_documents():
    """More than torch compiles anew before it gives up, which is an error in a whole graph."""
    torch._dynamo.reset()
    model = make_model(selection_kl=1.0).float()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for count in range(1, 13):
        documents = make_documents([8] * (count - 1) + [96 - 8 * (count - 1)])
        tokens, positions, cu_seqlens, _ = pack(documents)
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        model(tokens, positions, cu_seqlens, 96, targets=torch.cat(documents))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_warm_up_is_as_if_all_blocks_were_chosen(compiled):
    torch._dynamo.reset()
    model, documents = make_model(), make_documents()
    inputs, targets = pack(documents), torch.cat(documents)
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")

    def outcome():
        objective = model(*inputs, targets=targets).objective
        return [objective, *torch.autograd.grad(objective, [*model.parameters()])]

    few, evaluated = outcome(), model.eval()(*inputs)
    model.train().select_all(True)
    operations, dense = model.flops([64]), outcome()
    assert torch.equal(model.eval()(*inputs), evaluated)
    model.train().select_all(False)
    assert all(map(torch.equal, outcome(), few)) and model.flops([64]) < operations
    for block in model.blocks:
        attention = block.attention
        attention.training_geometry = dataclasses.replace(attention.geometry, num_selected=8)
    for found, want in zip(dense, outcome(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)
