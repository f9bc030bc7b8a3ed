"""Reading a prompt once and starting again from its end equals reading everything each time."""

import pytest
import torch

from eval import lm as lm_module
from eval.lm import DecoderLM, batches
from model.generate import feed, generate
from model.probe import BlockRecall
from tests.eval.tiny import decoder

SIZES = {
    "_target_": "model.decoder.Decoder", "dim": 32, "num_layers": 2, "num_heads": 4,
    "num_kv_heads": 2, "ffn_dim": 64,
}  # fmt: skip
ATTENTIONS = {
    "full": {"_target_": "model.attention.full.FullAttention"},
    "sliding": {"_target_": "model.attention.sliding.SlidingAttention", "window": 9},
    "nsa": {
        "_target_": "model.attention.nsa.NSAAttention", "compress_block": 4, "compress_stride": 2,
        "select_block": 4, "num_selected": 4, "window": 6,
    },
}  # fmt: skip


def log_probability(model, prompt, candidate):
    tokens = torch.tensor(prompt + candidate)
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    with torch.inference_mode():
        logits = model(tokens, torch.arange(len(tokens)), cu_seqlens, len(tokens))
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(candidate)[:, None]).sum().item()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_scores_and_continuations(attention):
    model = decoder({"model": SIZES, "attention": ATTENTIONS[attention]}, 50)
    lm = DecoderLM(model, stop_tokens={0}, reserve=32)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 50, (n,), generator=draw).tolist() for n in (1, 14, 37)]
    candidates = [torch.randint(1, 50, (n,), generator=draw).tolist() for n in (1, 7, 3, 9)]
    expected = generate(model, prompts, 12, stop_tokens={0})
    scores = [[log_probability(model, prompt, c) for c in candidates] for prompt in prompts]
    for prompt, own, continuation in zip(prompts, scores, expected, strict=True):
        for _ in range(2):  # whatever was asked in between
            assert lm.score([prompt], [candidates])[0] == pytest.approx(own, abs=1e-3)
            assert lm.generate([prompt], 12) == [continuation]
    together = lm.score(prompts, [candidates] * 3)
    for found, own in zip(together, scores, strict=True):
        assert found == pytest.approx(own, abs=1e-3)
    assert lm.generate(prompts, 12) == expected
    for prompt, (logprobs, greedy) in zip(prompts, lm.logprobs(prompts), strict=True):
        assert len(logprobs) == len(greedy) == len(prompt) - 1
        total = log_probability(model, prompt[:1], prompt[1:]) if len(prompt) > 1 else 0
        assert logprobs.sum() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_one_cache_and_its_graph_serve_batch_after_batch(attention, device):
    sizes = SIZES | {"head_dim": 64, "kv_conv": 4}
    model = decoder({"model": sizes, "attention": ATTENTIONS[attention]}, 50).to(device)
    with torch.no_grad():  # the convolution starts as the identity, where a mistake could hide
        for name, parameter in model.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter) * ("_conv" in name)
    lm = DecoderLM(model, (), reserve=16)
    draw = torch.Generator().manual_seed(2)
    caches = []
    for length in (70, 64, 90):
        prompts = [torch.randint(50, (n,), generator=draw).tolist() for n in (length, length - 9)]
        candidates = [torch.randint(50, (n,), generator=draw).tolist() for n in (3, 8, 1)]
        with BlockRecall(*torch.zeros(2, 1, dtype=torch.int64)) as probe:  # as needle.py asks
            [scores, others] = lm.score(prompts, [candidates] * 2)
        layers = len(model.blocks) if attention == "nsa" else 0
        assert [share.tolist() for share in probe.found] == [[1.0]] * layers
        continued = lm.generate(prompts, 5)
        for prompt, found, new in zip(prompts, (scores, others), continued, strict=True):
            for candidate, score in zip(candidates, found, strict=True):
                [(logprobs, _)] = lm.logprobs([prompt + candidate])
                assert score == pytest.approx(float(logprobs[len(prompt) - 1 :].sum()), abs=2e-2)
            [(_, greedy)] = lm.logprobs([prompt + new])
            assert greedy[len(prompt) - 1 :].all()
        caches.append(lm._cache)
    assert caches[0] is caches[1] is not caches[2]  # the last does not fit


def test_a_continuation_without_tokens_costs_nothing():
    lm = DecoderLM(decoder({"model": SIZES, "attention": ATTENTIONS["full"]}, 50), ())
    assert lm.score([[1, 2], [3]], [[[]], [[]]]) == [[0.0], [0.0]]


def test_a_continuation_beyond_the_reserve_makes_room():
    lm = DecoderLM(decoder({"model": SIZES, "attention": ATTENTIONS["full"]}, 50), (), reserve=4)
    [short], [long] = lm.generate([[1, 2, 3]], 4), lm.generate([[1, 2, 3]], 9)
    assert len(long) == 9 and long[:4] == short
    [score] = lm.score([[1, 2, 3]], [[long + long]])
    [(logprobs, greedy)] = lm.logprobs([[1, 2, 3] + long + long])
    assert score == [pytest.approx(float(logprobs[2:].sum()), abs=1e-3)] and greedy[2:11].all()


def test_what_was_read_once_is_not_read_again(monkeypatch):
    model, read = decoder({"model": SIZES, "attention": ATTENTIONS["full"]}, 50), []
    monkeypatch.setattr(lm_module, "feed", lambda *args: read.append(args[2]) or feed(*args))
    lm = DecoderLM(model, (), reserve=8)
    prompts = [[1] * 20, [2] * 30]
    lm.score(prompts, [[[3], [4, 5]]] * 2)
    lm.generate(prompts, 4)
    assert sum(len(tokens) > 9 for batch in read for tokens in batch) == 2


def test_a_batch_of_the_longest_prompts_is_full():
    """As many as an evaluator hands over at once, so that scoring and generating share them."""
    for length in (512, 4096, 65536):
        count = lm_module.BATCH_TOKENS // length
        assert list(batches([length - 16] * count)) == [slice(0, count)]


def test_batches_hold_at_most_their_limit():
    lengths = [3, 4, 5, 20, 1, 1]
    parts = [lengths[part] for part in batches(lengths, 9)]
    assert parts == [[3, 4], [5], [20], [1, 1]] and list(batches([])) == []


def test_the_stop_token_ends_the_answer():
    model = decoder({"model": SIZES, "attention": ATTENTIONS["full"]}, 50)
    [free] = DecoderLM(model, stop_tokens=()).generate([[1, 2, 3]], 8)
    stop = free[4]
    stopped, other = DecoderLM(model, stop_tokens={stop}).generate([[1, 2, 3], [4, 5]], 8)
    assert stopped == free[: free.index(stop)]
    assert other == DecoderLM(model, stop_tokens={stop}).generate([[4, 5]], 8)[0]
