"""Which parameters decay."""

from torch import nn

from model.build import build_decoder
from train.optimizer import parameter_groups

MODEL = dict(
    _target_="model.decoder.Decoder", dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=24,
    tie_embeddings=False,
)  # fmt: skip


def test_only_projection_matrices_decay():
    model = build_decoder(MODEL, dict(_target_="model.attention.nsa.NSAAttention"), 30)
    decay, keep = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)
    decays = {id(p) for p in decay["params"]}
    assert len(decays) + len(keep["params"]) == len(list(model.parameters()))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (id(module.weight) in decays) == (not name.endswith("branch_gates")), name
        elif isinstance(module, nn.RMSNorm | nn.Embedding):
            assert id(module.weight) not in decays, name
    assert sum(p.dim() == 2 for p in decay["params"]) == len(decays)
