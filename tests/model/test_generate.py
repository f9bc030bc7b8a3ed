"""Generation: sampling, the step that feeds itself, and its CUDA graph."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import rotary
from model.build import build_decoder
from model.cache import Cache
from model.generate import Step, _sample, extend, generate, stream
from tests.model.test_decoder import ATTENTIONS, MODEL, VOCAB, pack

WIDE = MODEL | dict(dim=128, head_dim=64)
ON_GPU = {
    "full": dict(_target_="model.attention.full.FullAttention"),
    "sliding": dict(_target_="model.attention.sliding.SlidingAttention", window=100),
    "nsa": dict(_target_="model.attention.nsa.NSAAttention"),
}


def make_model(attention, model=MODEL):
    """Convolved: what the cache keeps for it is on every path below."""
    torch.manual_seed(0)
    model = build_decoder(model | dict(kv_conv=4), attention, VOCAB)
    with torch.no_grad():  # gates and scores start at zero, where a mistake could hide
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_greedy_tokens_are_those_of_the_whole_forward(attention):
    model = make_model(ATTENTIONS[attention]).double()
    prompts = [[3], list(range(9))]
    for prompt, continuation in zip(prompts, generate(model, prompts, 25), strict=True):
        tokens = torch.tensor(prompt + continuation)
        with torch.no_grad():
            best = model(*pack([tokens])).argmax(-1)
        assert continuation == best[len(prompt) - 1 : -1].tolist()


def test_a_full_cache_is_one_sentence():
    model = make_model(ATTENTIONS["nsa"])
    cache = Cache(1, len(model.blocks), 4)
    logits = extend(model, cache, [[1, 2, 3]])
    step = Step(model, cache, logits.argmax(-1), 0.0, 1.0, torch.Generator())
    step()
    with pytest.raises(ValueError, match="holds 4 tokens; 5 are needed"):
        step()


class Counter(TorchDispatchMode):
    """How many operators ran inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "attention, most", dict(full=24, sliding=24, nsa=37, nsa_mlp=54, nsa_mean=44).items()
)
@torch.inference_mode()
def test_a_layer_of_a_step_is_few_operators(monkeypatch, attention, most):
    """Views included. Each is a launch on a GPU, and a small model's step waits for nothing else."""
    counts = []
    # There it is one operator; its twin is several.
    monkeypatch.setattr(rotary, "norm_rotate", lambda x, *rest: torch.empty_like(x))
    for layers in (1, 2):
        model = build_decoder(MODEL | dict(num_layers=layers), ATTENTIONS[attention], VOCAB)
        cache = Cache(2, layers, 20)
        tokens = extend(model, cache, [[1] * 9, [2] * 5]).argmax(-1)
        step = Step(model, cache, tokens, 0.0, 1.0, torch.Generator())
        with Counter() as counter:
            step()
        counts.append(counter.count)
    assert counts[1] - counts[0] <= most


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(*sampling):
        return _sample(logits, *sampling, generator).bincount(minlength=4) / len(logits)

    def near(got, want):
        torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=0.015)

    near(frequencies(1.0, 1.0), [0.5, 0.3, 0.15, 0.05])
    near(frequencies(1.0, 0.8), [0.625, 0.375, 0.0, 0.0])
    near(frequencies(0.5, 1.0), [0.685, 0.247, 0.062, 0.007])
    assert not frequencies(1.0, 0.0)[1:].any() and not frequencies(0.0, 1.0)[1:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ON_GPU)
@torch.inference_mode()
def test_cached_logits_equal_the_training_forward_on_a_gpu(attention):
    model = make_model(ON_GPU[attention], WIDE).cuda().bfloat16()
    documents = [torch.randint(VOCAB, (n,)).cuda() for n in (700, 40)]
    tokens, positions, cu_seqlens, longest = pack([d.cpu() for d in documents])
    whole = model(tokens.cuda(), positions.cuda(), cu_seqlens.cuda(), longest).split([700, 40])
    cache, start = Cache(2, len(model.blocks), 700), 8
    got = [extend(model, cache, [d[:start].tolist() for d in documents])]
    for t in range(start, 40):
        got.append(extend(model, cache, [d[t : t + 1].tolist() for d in documents]))
    want = torch.stack([w[start - 1 : 40] for w in whole], 1)
    error = (torch.stack(got).float() - want.float()).norm() / want.float().norm()
    assert error < 2e-2

    cache = Cache(1, len(model.blocks), 700)
    extend(model, cache, [documents[0][:600].tolist()])
    got = [extend(model, cache, [documents[0][t : t + 1].tolist()]) for t in range(600, 700)]
    error = (torch.cat(got).float() - whole[0][600:].float()).norm() / whole[0][600:].float().norm()
    assert error < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ON_GPU)
@torch.inference_mode()
def test_the_graph_repeats_the_step(attention):
    model = make_model(ON_GPU[attention], WIDE).cuda().bfloat16()
    prompts = [torch.randint(VOCAB, (n,)).tolist() for n in (500, 31)]
    cache = Cache(2, len(model.blocks), 600)
    tokens = extend(model, cache, prompts).argmax(-1)
    step_by_step = []
    for _ in range(80):
        step_by_step.append(tokens.tolist())
        tokens = extend(model, cache, tokens[:, None].tolist()).argmax(-1)
    assert list(stream(model, prompts, 80)) == step_by_step
    sampled = [generate(model, prompts, 20, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(set(sampled[0][0])) > 1
