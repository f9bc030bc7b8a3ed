"""What the decoder promises whatever its attention: causality, packing, caching."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.build import build_decoder
from model.cache import Cache
from model.decoder import ATTENTION_OPS
from model.generate import extend, generate

MODEL = dict(
    _target_="model.decoder.Decoder", dim=24, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=32
)
NSA = dict(
    _target_="model.attention.nsa.NSAAttention",
    compress_block=4, compress_stride=2, select_block=8, num_selected=3, window=5,
)  # fmt: skip
ATTENTIONS = {
    "full": dict(_target_="model.attention.full.FullAttention"),
    "sliding": dict(_target_="model.attention.sliding.SlidingAttention", window=7),
    "nsa": NSA,
    "nsa_mlp": NSA | dict(compression="mlp"),
    "nsa_mean": NSA | dict(compression="mean", compress_stride=4),
    "nsa_and_full": NSA,
}
CONVOLVED = {f"{name}_conv": ATTENTIONS[name] for name in ("full", "sliding", "nsa")}
VOCAB = 40
LENGTHS = [37, 1, 5, 20]


@pytest.fixture(params=ATTENTIONS | CONVOLVED)
def model(request):
    torch.manual_seed(0)
    sizes = MODEL | dict(kv_conv=4 if request.param in CONVOLVED else 0)
    sizes |= dict(full_layers=[1] if request.param == "nsa_and_full" else [])
    model = build_decoder(sizes, (ATTENTIONS | CONVOLVED)[request.param], VOCAB).double()
    with torch.no_grad():  # gates and scores start at zero, where a mistake could hide
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def pack(documents):
    lengths = [len(d) for d in documents]
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.cat(documents), positions, cu_seqlens, max(lengths)


def make_documents(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_changed_future_token_changes_no_earlier_logit(model):
    (document,) = make_documents([37])
    before = model(*pack([document]))
    for t in (1, 8, 15, 16, 17, 30, 36):
        changed = document.clone()
        changed[t] = (changed[t] + 1) % VOCAB
        after = model(*pack([changed]))
        assert torch.equal(after[:t], before[:t])
        assert not torch.equal(after[t], before[t])


def test_a_packed_batch_equals_its_documents_alone(model):
    documents = make_documents()
    packed = model(*pack(documents)).split(LENGTHS)
    for logits, document in zip(packed, documents, strict=True):
        close(logits, model(*pack([document])))


def test_packed_gradients_are_the_sum_of_the_documents(model):
    documents = make_documents()
    model(*pack(documents), targets=torch.cat(documents)).objective.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for document in documents:
        share = len(document) / sum(LENGTHS)
        (model(*pack([document]), targets=document).objective * share).backward()
    for name, parameter in model.named_parameters():
        close(packed[name], parameter.grad)


@pytest.mark.parametrize("attention", ["full", "sliding", "nsa"])
def test_the_convolution_starts_as_nothing(attention):
    documents, models = make_documents(), []
    for width in (0, 4):
        torch.manual_seed(0)
        models.append(build_decoder(MODEL | dict(kv_conv=width), ATTENTIONS[attention], VOCAB))
    plain, convolved = models
    assert torch.equal(convolved(*pack(documents)), plain(*pack(documents)))
    extra = convolved.num_parameters() - plain.num_parameters()
    added = convolved.flops_per_token(64) - plain.flops_per_token(64)
    assert added == pytest.approx(6 * extra) and extra > 0


@torch.no_grad()
def test_cached_logits_equal_the_training_forward(model):
    """Prefill to different lengths, then token by token over block and window borders."""
    documents = make_documents()
    expected = model(*pack(documents)).split(LENGTHS)
    cache = Cache(len(LENGTHS), len(model.blocks), max(LENGTHS))
    seen = [9, 1, 2, 11]
    new = [d[:n].tolist() for d, n in zip(documents, seen, strict=True)]
    while True:
        logits = extend(model, cache, new)
        for i, n in enumerate(seen):
            if n <= LENGTHS[i]:
                close(logits[i], expected[i][n - 1])
        if max(n - length for n, length in zip(seen, LENGTHS, strict=True)) >= 0:
            break  # the shortest document is over; go on with the longest alone
        seen = [n + 1 for n in seen]
        new = [d[n - 1 : n].tolist() for d, n in zip(documents, seen, strict=True)]

    cache = Cache(1, len(model.blocks), 37)
    for start, end in ((0, 3), (3, 4), (4, 21), (21, 22), (22, 23), (23, 37)):
        logits = extend(model, cache, [documents[0][start:end].tolist()])
        close(logits[0], expected[0][end - 1])


def test_generation_stops_and_batches(model):
    prompts = [[1, 2, 3], [4] * 20]
    together = generate(model, prompts, 6)
    assert together == [generate(model, [p], 6)[0] for p in prompts]
    stopped = generate(model, prompts, 6, stop_tokens=[together[0][2]])
    assert stopped[0] == together[0][: together[0].index(together[0][2])]
    sampled = [generate(model, prompts, 6, temperature=1.0, top_p=0.9, seed=s) for s in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, [[]], 1)


class Calls(TorchDispatchMode):
    """Counts forward calls of the attention operators."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op in ATTENTION_OPS
        return op(*args, **(kwargs or {}))


def test_activation_checkpointing_changes_nothing_but_what_is_computed_twice(model):
    documents = make_documents()
    gradients, calls = [], []
    for what in ("none", "full", "selective"):
        model.recompute(what)
        model.zero_grad()
        with Calls() as counter:
            model(*pack(documents), targets=torch.cat(documents)).objective.backward()
        calls.append(counter.count)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))
    assert calls == [calls[0], 2 * calls[0], calls[0]]


@pytest.mark.parametrize(
    "model_change, attention, message",
    [
        (dict(num_kv_heads=3), "full", "num_kv_heads=3"),
        (dict(dim=26), "full", "model.dim=26"),
        (dict(kv_conv=1), "full", "model.kv_conv=1; give it 2"),
        (dict(full_layers=[9]), "nsa", "no layer 9"),
        (dict(num_layer=2), "full", r"did you mean model.num_layers\?"),
        ({}, dict(_target_="model.attention.nsa.NSAAttention", windw=3), "attention.windw"),
        ({}, dict(_target_="model.attention.nsa.NSAAttention", compression="x"), "choose one of"),
        ({}, dict(_target_="os.system"), "package `model`"),
        ({}, dict(_target_="model.attention.nsa.Missing"), "no such class"),
    ],
)
def test_a_wrong_size_or_key_is_one_sentence(model_change, attention, message):
    attention = ATTENTIONS[attention] if isinstance(attention, str) else attention
    with pytest.raises(ValueError, match=message) as error:
        build_decoder(MODEL | model_change, attention, VOCAB)
    assert "\n" not in str(error.value)
