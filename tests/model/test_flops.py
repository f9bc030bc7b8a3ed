"""The formula for a training step's operations against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from model.build import build_decoder

T, WINDOW, VOCAB = 512, 64, 300
MODEL = dict(
    _target_="model.decoder.Decoder", dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=96
)
ATTENTIONS = {
    "full": dict(_target_="model.attention.full.FullAttention"),
    "sliding": dict(_target_="model.attention.sliding.SlidingAttention", window=WINDOW),
    "nsa": dict(_target_="model.attention.nsa.NSAAttention"),
    "nsa_mlp": dict(_target_="model.attention.nsa.NSAAttention", compression="mlp"),
}
CONVOLVED = ("full", "nsa_mlp")


def causal(formula):
    """torch counts all T x T pairs of its attention, masked or not."""
    return lambda *shapes, **kwargs: int(formula(*shapes, **kwargs) * (T + 1) / (2 * T))


def of_tensors(formula):
    """torch hands its formulas for attention the shapes of q, k and v, whatever follows."""
    return causal(lambda *args, out_shape=None, **kwargs: formula(*args[:3]))


def backward_of_tensors(formula):
    return causal(lambda *args, out_shape=None, **kwargs: formula(*args[:4]))


COUNTED_BY_US = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_tensors(sdpa_flop),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_of_tensors(
        sdpa_backward_flop
    ),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_formula_counts_what_torch_counts(attention, tied):
    sizes = MODEL | dict(tie_embeddings=tied, kv_conv=4 if attention in CONVOLVED else 0)
    model = build_decoder(sizes, ATTENTIONS[attention], VOCAB)
    tokens = torch.randint(VOCAB, (T,))
    with FlopCounterMode(display=False, custom_mapping=COUNTED_BY_US) as counter:
        inputs = tokens, torch.arange(T), torch.tensor([0, T]).int(), T
        model(*inputs, targets=tokens).objective.backward()
    assert model.flops_per_token(T) * T == pytest.approx(counter.get_total_flops(), rel=0.005)
