"""Which parameters get what, and Muon on whole matrices."""

import copy

import pytest
import torch
from torch import nn

from model.build import build_decoder
from tests.train.ranks import config, pretrain
from tests.train.test_run import metrics, same_weights, weights
from train.config import check_config
from train.optimizer import LrScale, Muon, OptimizerConfig, build_optimizer, parameter_groups

MODEL = dict(
    _target_="model.decoder.Decoder", dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=24,
    tie_embeddings=False,
)  # fmt: skip


def settings(name="adamw", **scale):
    scale = {"head": 1.0, "embeddings": 1.0, "gates": 1.0, "norms": 1.0} | scale
    return OptimizerConfig(name, 0.01, LrScale(**scale), 0.1, [0.9, 0.95], 1e-8, 0.95)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_decoder(MODEL, dict(_target_="model.attention.nsa.NSAAttention"), 30)


def test_only_projection_matrices_and_the_head_decay(model):
    groups = parameter_groups(model, settings())
    decays = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (id(module.weight) in decays) == (not name.endswith("branch_gates")), name
        elif isinstance(module, nn.RMSNorm | nn.Embedding):
            assert id(module.weight) not in decays, name


def test_each_kind_has_its_learning_rate(model):
    groups = parameter_groups(model, settings(gates=3.0, embeddings=0.5))
    scales = {group["kind"]: group["lr_scale"] for group in groups}
    assert scales == {"matrices": 1, "head": 1, "embeddings": 0.5, "gates": 3, "norms": 1}
    gates = next(group["params"] for group in groups if group["kind"] == "gates")
    assert len(gates) == 2 + 2 * 2  # weight and bias; score and position of keys and of values


def test_muon_moves_matrices_along_orthogonal_directions(model):
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, settings("muon"), zero_stage=0, fused=False)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    name = "blocks.0.feed_forward.up_proj.weight"
    moved = model.state_dict()[name] - before[name] * (1 - 0.01 * 0.1)
    values = torch.linalg.svdvals(moved)
    assert values.max() < 2 * values.min()  # a random gradient's would differ by more
    moved = (model.state_dict()["norm.weight"] - before["norm.weight"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01))  # Adam's first step


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_muon_steps_matrices_together_as_torch_does_alone(device):
    torch.manual_seed(0)
    shapes = (8, 6), (6, 8), (8, 6), (5, 5), (8, 6)
    matrices = [torch.randn(shape, device=device) for shape in shapes]
    ours, theirs = ([nn.Parameter(m.clone()) for m in matrices] for _ in "ab")
    how = dict(lr=0.1, momentum=0.9)
    together = Muon(ours, **how)
    alone = torch.optim.Muon(theirs, **how, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours[:-1], theirs[:-1], strict=True):  # the last one has no gradient
            a.grad = b.grad = torch.randn_like(a)
        together.step()
        alone.step()
    for a, b, before in zip(ours, theirs, matrices, strict=True):
        assert (a - b).norm() <= 0.03 * (b - before).norm()  # theirs is in bf16


def test_bf16_parameters_follow_fp32_copies(model):
    model = model.bfloat16()
    optimizer = build_optimizer(model, settings(), zero_stage=0, fused=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p, dtype=torch.float32)
    optimizer.step()
    for p in model.parameters():
        assert optimizer.masters[p].dtype == torch.float32
        assert torch.equal(p, optimizer.masters[p].bfloat16())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_trains_and_resumes_on_two_ranks(tmp_path, precision):
    how = ["optimizer=muon", "parallel=zero0", f"train.precision={precision}"]
    pretrain(tmp_path, "name=whole", *how)
    pretrain(tmp_path, "name=halves", "train.max_steps=3", *how)
    pretrain(tmp_path, "name=halves", "train.resume=true", *how)
    same_weights(weights(tmp_path / "whole"), weights(tmp_path / "halves"))
    losses = [m["loss"] for m in metrics(tmp_path / "whole") if "loss" in m]
    assert losses[-1] < losses[0] - 0.05


def test_muon_under_zero_says_what_to_choose():
    with pytest.raises(ValueError, match="parallel=zero0"):
        check_config(config("optimizer=muon", "parallel=zero2"))
