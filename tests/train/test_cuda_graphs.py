"""Passes replayed from CUDA graphs, against the same passes launched one by one."""

import pytest
import torch

from data.batch import Batch
from model.build import build_decoder
from model.decoder import Decoder
from tests.train.ranks import config
from train.cuda_graphs import CapturedPasses

LENGTHS = [[256] * 8, [2048], [100, 156, 1, 999, 792], [40] * 51 + [8], [2048], [256] * 8]
ATTENTIONS = ["nsa", "full"]


def batch(lengths: list[int], seed: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 512, (sum(lengths) + 1,), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    answers = 4 * (torch.rand(len(positions), generator=generator) - 0.7).relu()
    return Batch(tokens[:-1], tokens[1:], answers, positions, borders, max(lengths)).to(device)


def build(attention: str) -> Decoder:
    raw = config("device=cpu", f"attention={attention}", "model.head_dim=64", "model.kv_conv=4")
    torch.manual_seed(0)
    model = build_decoder(raw["model"], raw["attention"], 512)
    model.answer_share = 4.0
    return model


def passes(model: Decoder, parts: list[Batch]) -> list[tuple]:
    """Of each pass the loss, whose graph lives on as in a training loop, and the gradients of half of
    it."""
    found = []
    for part in parts:
        model.zero_grad()
        inputs = part.tokens, part.positions, part.cu_seqlens, part.max_seqlen
        loss = model(*inputs, targets=part.targets, answers=part.answers)
        (loss.objective / 2).backward()
        found.append((loss, {n: p.grad.float() for n, p in model.named_parameters()}))
    return found


def capture(model: Decoder) -> CapturedPasses:
    captured = model.forward = CapturedPasses(model)
    captured.begin_stage(2048)
    return captured


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_replayed_losses_and_gradients_are_those_of_eager_passes(attention):
    model = build(attention).to("cuda", torch.bfloat16)
    parts = [batch(lengths, seed, "cuda") for seed, lengths in enumerate(LENGTHS)]
    eager, captured = passes(model, parts), capture(model)
    replayed = passes(model, parts)
    assert sorted(captured.graphs) == [(2048, 1), (2048, 16), (2048, 64)]
    for (loss, wanted), (other, got) in zip(eager, replayed, strict=True):
        for a, b in zip(loss, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for name, gradient in wanted.items():
            error = (got[name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
            assert error < 0.05, name


@pytest.mark.gpu
def test_gradients_of_two_passes_add_up():
    model = build("nsa").cuda()
    one, two = (batch([2048], seed, "cuda") for seed in range(2))
    capture(model)

    def gradient(*parts: Batch) -> torch.Tensor:
        model.zero_grad()
        for part in parts:
            inputs = part.tokens, part.positions, part.cu_seqlens, part.max_seqlen
            model(*inputs, targets=part.targets, answers=part.answers).objective.backward()
        return model.embedding.weight.grad.clone()

    torch.testing.assert_close(gradient(one, two), gradient(one) + gradient(two))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_empty_documents_and_a_longer_bound_change_nothing(attention, no_graphs):
    model = build(attention)
    parts = [batch(lengths, 0, "cpu") for lengths in ([100, 156, 1, 43], [300], [6] * 50)]
    eager, captured = passes(model, parts), capture(model)
    replayed = passes(model, parts)
    assert sorted(captured.graphs) == [(300, 1), (300, 16), (300, 64)]
    for (loss, wanted), (other, got) in zip(eager, replayed, strict=True):
        assert other.objective.requires_grad and not other.nll_sum.requires_grad
        torch.testing.assert_close(tuple(loss), tuple(other))
        torch.testing.assert_close(wanted, got)


@pytest.mark.gpu
def test_another_share_of_answers_counts_from_the_next_stage_on():
    model = build("full").to("cuda", torch.bfloat16)
    parts, captured = [batch([256] * 8, 0, "cuda")], capture(model)
    heavy = passes(model, parts)[0][0].objective
    model.answer_share = 0.0
    captured.begin_stage(2048)
    light = passes(model, parts)[0][0].objective
    model.forward = captured.eager
    expected = passes(model, parts)[0][0].objective
    torch.testing.assert_close(light, expected, rtol=1e-4, atol=1e-4)
    assert heavy > 1.5 * light


def test_evaluation_is_not_captured(no_graphs):
    model = build("nsa")
    captured, part = capture(model), batch([300, 212], 0, "cpu")
    inputs = part.tokens, part.positions, part.cu_seqlens, part.max_seqlen
    with torch.no_grad():
        model(*inputs, targets=part.targets, answers=part.answers)
    assert model(*inputs).shape == (512, 512)  # logits
    model.eval()
    model(*inputs, targets=part.targets, answers=part.answers)
    assert not captured.graphs
