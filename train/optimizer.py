"""Optimizers, which parameters get what, and a step that can be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LrScale:
    """Learning rates of the other kinds of parameters, as multiples of the matrices'."""

    head: float
    embeddings: float
    gates: float
    norms: float


@dataclass(frozen=True)
class OptimizerConfig:
    """conf/optimizer"""

    name: Literal["adamw", "muon"]
    lr: float
    lr_scale: LrScale
    weight_decay: float
    betas: list[float]
    eps: float
    momentum: float | None = None  # Muon's

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr={self.lr}; it must be greater than 0.")


def kind_of(name: str, parameter: Tensor) -> str:
    """matrices, head, embeddings, gates (what steers the branches of NSA: branch gates, scores and
    position encodings of the compression) or norms (whatever scales single channels, the short
    convolution too), by the parameter's name and shape."""
    if name == "embedding.weight":
        return "embeddings"
    if name == "head.weight":
        return "head"
    if name.endswith("proj.weight") and parameter.dim() == 2:
        return "matrices"
    if "branch_gates" in name or ".compress_" in name:
        return "gates"
    return "norms"


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """One group per kind; only matrices and the head decay."""
    kinds: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        kinds.setdefault(kind_of(name, parameter), []).append(parameter)
    scale = {"matrices": 1.0, **asdict(config.lr_scale)}
    return [
        {
            "params": parameters, "kind": kind, "lr_scale": scale[kind],
            "weight_decay": config.weight_decay if kind in ("matrices", "head") else 0.0,
        }
        for kind, parameters in kinds.items()
    ]  # fmt: skip


class Refusable:
    """Mixin: step() does nothing while veto() holds, and can measure how far it moves.

    DeepSpeed calls step() after it knows the gradient norm, for one part of the parameters after
    the other, and copies the result into the model afterwards: to do nothing here is to skip.
    """

    veto: Callable[[], bool] = staticmethod(lambda: False)
    measuring = False
    moved: Tensor | float = 0.0  # sum of squares of the measured change

    def step(self, closure=None) -> None:
        if self.veto():
            return
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters] if self.measuring else []
        self.update()
        for old, new in zip(before, parameters, strict=False):
            self.moved = self.moved + (new.detach() - old).square().sum()


class AdamW(Refusable, torch.optim.AdamW):
    """torch's AdamW over what DeepSpeed gives it: flat fp32 pieces under ZeRO 1 to 3."""

    def update(self) -> None:
        torch.optim.AdamW.step(self)


class Muon(torch.optim.Muon):
    """torch's with Nesterov momentum and steps of AdamW's size (arXiv 2502.16982), for all matrices of a
    shape together: torch launches some 24 kernels for each matrix, which a GPU would wait for.

    Newton-Schulz steps are in bf16 on a GPU, as torch's, and in fp32 on a CPU, where bf16 is slower.
    """

    def __init__(self, params, lr: float, momentum: float):
        super().__init__(params, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                gradients = [p.grad for p in parameters]
                buffers = [self._momentum(p) for p in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - momentum)
                updates = torch.stack(torch._foreach_lerp(gradients, buffers, momentum))
                updates = updates.bfloat16() if updates.is_cuda else updates
                updates = orthogonal(updates, group["ns_coefficients"], group["ns_steps"])
                torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
                size = 0.2 * max(shape) ** 0.5
                torch._foreach_add_(parameters, updates.float().unbind(), alpha=-lr * size)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The matrices x [count, rows, columns] with their singular values moved to near 1, by Newton-Schulz
    steps (Jordan 2024, https://kellerjordan.github.io/posts/muon)."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class WholeOptimizer(Refusable, torch.optim.Optimizer):
    """The optimizer of ZeRO-0, where every rank holds all parameters whole.

    Muon for the matrices, if asked for, and AdamW for the rest. A bf16 parameter gets an fp32 copy that is
    stepped in its place, and gradients that accumulate in fp32.
    """

    def __init__(self, groups: list[dict], config: OptimizerConfig, fused: bool):
        self.parameters = [p for group in groups for p in group["params"]]
        self.masters = {p: _master(p) for p in self.parameters}
        groups = [{**g, "params": [self.masters[p] for p in g["params"]]} for g in groups]
        super().__init__(groups, {"lr": config.lr})
        muon = [g for g in self.param_groups if config.name == "muon" and g["kind"] == "matrices"]
        rest = [g for g in self.param_groups if g not in muon]
        self.inner = [_adamw(torch.optim.AdamW, rest, config, fused)]
        if muon:
            self.inner.append(Muon(muon, lr=config.lr, momentum=config.momentum))
        self.param_groups = [group for optimizer in self.inner for group in optimizer.param_groups]

    def state_of(self, master: Tensor) -> dict:
        """Moments of one parameter; a dict that may be filled."""
        for optimizer in self.inner:
            if any(master is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state[master]
        raise KeyError("not a parameter of this optimizer")

    @torch.no_grad()
    def update(self) -> None:
        for parameter, master in self.masters.items():
            master.grad = parameter.grad
        for optimizer in self.inner:
            optimizer.step()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the fp32 values into the model."""
        copies = [(p, master) for p, master in self.masters.items() if master is not p]
        if copies:
            torch._foreach_copy_(*map(list, zip(*copies, strict=True)))
        for _, master in copies:
            master.grad = None


def _master(parameter: Tensor) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    parameter.grad_dtype = torch.float32
    return nn.Parameter(parameter.detach().float())


def _adamw(cls, groups: list[dict], config: OptimizerConfig, fused: bool):
    return cls(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=fused)


def build_optimizer(model: nn.Module, config: OptimizerConfig, zero_stage: int, fused: bool):
    """An optimizer for DeepSpeed. `model` has its final dtype and device if zero_stage is 0."""
    groups = parameter_groups(model, config)
    if zero_stage == 0:
        return WholeOptimizer(groups, config, fused)
    return _adamw(AdamW, groups, config, fused)
