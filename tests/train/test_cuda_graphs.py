"""Passes replayed from CUDA graphs, against the same passes launched one by one."""

import pytest
import torch

from data.batch import Batch
from model.build import build_decoder
from tests.train.ranks import config
from train.cuda_graphs import CapturedPasses

pytestmark = pytest.mark.gpu
LENGTHS = [[256] * 8, [2048], [100, 156, 1, 999, 792], [40] * 51 + [8], [2048], [256] * 8]


def batch(lengths: list[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 512, (sum(lengths) + 1,), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    return Batch(tokens[:-1], tokens[1:], positions, borders, max(lengths)).to("cuda")


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_replayed_losses_and_gradients_are_those_of_eager_passes(attention):
    raw = config("device=cpu", f"attention={attention}", "model.head_dim=64", "model.kv_conv=4")
    torch.manual_seed(0)
    model = build_decoder(raw["model"], raw["attention"], 512).to("cuda", torch.bfloat16)
    parts = [batch(lengths, seed) for seed, lengths in enumerate(LENGTHS)]

    def gradients() -> list[tuple]:
        found = []
        for part in parts:
            model.zero_grad()
            loss = model(*part[:1], *part[2:], targets=part.targets)
            (loss.objective / 2).backward()
            found.append(
                (
                    [x.detach() for x in loss],
                    {n: p.grad.float() for n, p in model.named_parameters()},
                )
            )
        return found

    eager = gradients()
    passes = model.forward = CapturedPasses(model)
    passes.begin_stage(2048)
    replayed = gradients()
    assert sorted(passes.graphs) == [(2048, 1), (2048, 16), (2048, 64)]
    for (loss, wanted), (other, got) in zip(eager, replayed, strict=True):
        for a, b in zip(loss, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for name, gradient in wanted.items():
            error = (got[name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
            assert error < 0.05, name


def test_gradients_of_two_passes_add_up():
    raw = config("device=cpu", "model.head_dim=64")
    torch.manual_seed(0)
    model = build_decoder(raw["model"], raw["attention"], 512).cuda()
    one, two = batch([2048], 0), batch([2048], 1)

    def gradient(*parts: Batch) -> torch.Tensor:
        model.zero_grad()
        for part in parts:
            model(*part[:1], *part[2:], targets=part.targets).objective.backward()
        return model.embedding.weight.grad.clone()

    passes = model.forward = CapturedPasses(model)
    passes.begin_stage(2048)
    torch.testing.assert_close(gradient(one, two), gradient(one) + gradient(two))


def test_evaluation_is_not_captured():
    raw = config("device=cpu", "model.head_dim=64")
    model = build_decoder(raw["model"], raw["attention"], 512).to("cuda", torch.bfloat16)
    passes = model.forward = CapturedPasses(model)
    part = batch([300, 212], 0)
    with torch.no_grad():
        model(*part[:1], *part[2:], targets=part.targets)
    model.eval()
    model(*part[:1], *part[2:], targets=part.targets)
    assert not passes.graphs
