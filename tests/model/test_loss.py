"""The chunked loss against torch's cross_entropy over all logits."""

import pytest
import torch
import torch.nn.functional as F

from model import loss
from model.loss import IGNORED, linear_cross_entropy


@pytest.mark.parametrize("z_loss, softcap", [(0.0, 0.0), (0.01, 0.0), (0.0, 2.0), (0.01, 2.0)])
def test_equals_cross_entropy_with_gradients(monkeypatch, z_loss, softcap):
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 11 * 7)  # 7 rows a chunk
    torch.manual_seed(0)
    hidden = torch.randn(31, 6, requires_grad=True)
    weight = torch.randn(11, 6, requires_grad=True)
    targets = torch.randint(11, (31,))
    targets[[0, 9, 30]] = IGNORED

    answers = torch.zeros(31)
    answers[[1, 7, 8, 29]] = torch.tensor([5.0, 2.0, 2.0, 4.0])

    got = linear_cross_entropy(hidden, weight, targets, z_loss, softcap, answers, 0.5)
    grads = torch.autograd.grad(3.0 * got.objective, (hidden, weight))

    logits = hidden @ weight.T
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    nll = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    z = (logits.logsumexp(1).square() * (targets != IGNORED)).sum()
    objective = (nll.sum() + 0.5 * (answers * nll).sum() + z_loss * z) / 31
    expected = torch.autograd.grad(3.0 * objective, (hidden, weight))

    torch.testing.assert_close(got.objective, objective)
    sums = got.nll_sum, got.answer_nll, got.z_sum
    torch.testing.assert_close(sums, (nll.sum(), nll[answers > 0].sum(), z))
    assert got.count == 28 and got.answer_count == 4
    torch.testing.assert_close(grads, expected)


def test_answers_without_a_share_leave_the_objective_as_it_is():
    torch.manual_seed(0)
    hidden, weight = torch.randn(31, 6, requires_grad=True), torch.randn(11, 6)
    targets, answers = torch.randint(11, (31,)), torch.arange(31) % 3.0
    plain = linear_cross_entropy(hidden, weight, targets)
    marked = linear_cross_entropy(hidden, weight, targets, answers=answers)
    assert torch.equal(plain.objective, marked.objective) and plain.answer_count == 0
    grads = [torch.autograd.grad(loss.objective, hidden)[0] for loss in (plain, marked)]
    assert torch.equal(*grads)
