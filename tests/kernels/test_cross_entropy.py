"""The cross-entropy kernel against the plain torch of model/loss.py."""

import pytest
import torch

from kernels import cross_entropy
from model.loss import IGNORED, _cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("z_loss, softcap", [(0.0, 0.0), (0.01, 2.0)])
@pytest.mark.parametrize("vocab", [7, 100, 256])
def test_equals_the_twin(monkeypatch, vocab, z_loss, softcap):
    monkeypatch.setattr(cross_entropy, "COLUMNS", 64)
    torch.manual_seed(0)
    logits = 5 * torch.randn(13, vocab, device=DEVICE)
    targets = torch.randint(vocab, (13,), device=DEVICE)
    targets[[2, 12]] = IGNORED
    weights = torch.arange(13, device=DEVICE) / 4
    want = _cross_entropy(logits.clone(), targets, weights, 40, z_loss, softcap, True)
    nll, z = cross_entropy.cross_entropy_(logits, targets, weights, 40, z_loss, softcap, IGNORED)
    for got, expected in zip((nll, z, logits), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert not logits[[2, 12]].any()


@pytest.mark.gpu
def test_in_bf16():
    torch.manual_seed(0)
    logits = torch.randn(300, 32768, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(32768, (300,), device="cuda")
    weights = 1 + 1000 * torch.rand(300, device="cuda")
    want = _cross_entropy(logits.clone(), targets, weights, 300, 1e-4, 0.0, True)
    nll, z = cross_entropy.cross_entropy_(logits, targets, weights, 300, 1e-4, 0.0, IGNORED)
    torch.testing.assert_close((nll, z), want[:2], rtol=1e-4, atol=1e-4)
    error = (logits.float() - want[2].float()).norm() / want[2].float().norm()
    assert error < 5e-3
