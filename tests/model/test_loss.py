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

    got = linear_cross_entropy(hidden, weight, targets, z_loss, softcap)
    grads = torch.autograd.grad(3.0 * got.objective, (hidden, weight))

    logits = hidden @ weight.T
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    nll = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    z = (logits.logsumexp(1).square() * (targets != IGNORED)).sum()
    objective = (nll + z_loss * z) / 31
    expected = torch.autograd.grad(3.0 * objective, (hidden, weight))

    torch.testing.assert_close(got.objective, objective)
    torch.testing.assert_close((got.nll_sum, got.z_sum), (nll, z))
    assert got.count == 28
    torch.testing.assert_close(grads, expected)
