"""What NSA's gates and selection do on a batch: seen from outside, at the operator.

A dispatch mode sees every call of nsa::attention with its arguments and results, layer after layer,
so the model holds no code for it. Compiled blocks run uncompiled meanwhile.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.nsa.geometry import Geometry

BRANCHES = ("compressed", "selected", "window")


class OperatorProbe(TorchDispatchMode):
    """Calls see() for every nsa::attention inside `with probe:`, one a layer and forward pass."""

    def see(self, arguments: dict, indices: Tensor) -> None:
        """What the operator was given, by name, and the blocks that it selected."""
        raise NotImplementedError

    def __enter__(self):
        self.eager = torch.compiler.set_stance("force_eager")  # a compiled block shows no operators
        self.eager.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.eager.__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        if op is torch.ops.nsa.attention.default:
            names = (argument.name for argument in op._schema.arguments)
            self.see(dict(zip(names, args, strict=False)), results[-1])
        return results


class NSAProbe(OperatorProbe):
    """Statistics of the forward passes inside `with NSAProbe() as probe`, one entry a layer.

    Here as in BlockRecall, layers are those with NSA, counted from 0.
    """

    def __init__(self):
        super().__init__()
        self.gates: list[Tensor] = []  # [3] each: means over tokens and heads
        self.selection: list[dict[str, Tensor]] = []

    def see(self, arguments: dict, indices: Tensor) -> None:
        self.gates.append(arguments["gates"].float().mean((0, 1)))
        geometry = Geometry(*arguments["geometry"])
        self.selection.append(selection_statistics(indices, arguments["cu_seqlens"], geometry))

    def metrics(self, group: dist.ProcessGroup | None = None) -> dict[str, float | list[float]]:
        """gates/<branch>/layer_<i>; selection/overlap and /forced, by layer and as means; the
        histogram selection/distance over all layers. Empty without NSA. `group` are the ranks that
        share the heads, and all call it."""
        if group is not None:
            for layer in (*self.gates, *(x for s in self.selection for x in s.values())):
                dist.all_reduce(layer, group=group)
            self.gates = [gates / group.size() for gates in self.gates]
            for layer in self.selection:
                layer |= {name: layer[name] / group.size() for name in ("overlap", "forced")}
        metrics: dict[str, float | list[float]] = {}
        for layer, gates in enumerate(self.gates):
            for branch, mean in zip(BRANCHES, gates.tolist(), strict=True):
                metrics[f"gates/{branch}/layer_{layer:02d}"] = mean
        for name in ("overlap", "forced"):
            shares = [float(layer[name]) for layer in self.selection]
            for layer, share in enumerate(shares):
                metrics[f"selection/{name}/layer_{layer:02d}"] = share
            if shares:
                metrics[f"selection/{name}"] = sum(shares) / len(shares)
        if self.selection:
            counts = torch.stack([layer["distance"] for layer in self.selection]).sum(0)
            metrics["selection/distance"] = (counts / counts.sum().clamp(min=1)).tolist()
        return metrics


class BlockRecall(OperatorProbe):
    """Does the selection hold the block that a query needs?

    Of N pairs (query, needle), int64 [N] each, rows of one forward pass's packed tokens, both of one
    document: `found`, by layer the share [N] of key/value heads that select the needle's block for
    the query; and `chance` [N], what that would be if all but the blocks taken always were drawn.
    """

    def __init__(self, queries: Tensor, needles: Tensor):
        super().__init__()
        self.queries, self.needles = queries, needles
        self.found: list[Tensor] = []
        self.chance: Tensor | None = None

    def see(self, arguments: dict, indices: Tensor) -> None:
        geometry, cu_seqlens = Geometry(*arguments["geometry"]), arguments["cu_seqlens"]
        queries, needles = (rows.to(indices.device) for rows in (self.queries, self.needles))
        start = cu_seqlens[torch.searchsorted(cu_seqlens, queries.int(), right=True) - 1]
        own, block = ((rows - start) // geometry.select_block for rows in (queries, needles))
        chosen = indices[:, queries] == block[:, None]  # [Hkv, N, n]
        self.found.append(chosen.any(-1).float().mean(0))
        forced = (block < geometry.num_initial) | (own - block < geometry.num_local)
        always = geometry.num_initial + geometry.num_local
        drawn = (geometry.num_selected - always) / (own + 1 - always).clamp(min=1)
        self.chance = torch.where(forced, 1.0, drawn.clamp(max=1))

    def shares(self) -> dict[str, Tensor]:
        """selected/layer_00, … and selected/chance; empty without NSA."""
        layers = {f"selected/layer_{i:02d}": share for i, share in enumerate(self.found)}
        return layers | ({} if self.chance is None else {"selected/chance": self.chance})


def selection_statistics(
    indices: Tensor, cu_seqlens: Tensor, geometry: Geometry, chunk: int = 4096
) -> dict[str, Tensor]:
    """Of the selected blocks indices int32 [Hkv, T, n], -1 where there is none:

    overlap   share of a token's blocks that the token before it in the document chose too
    forced    share of the blocks that are taken always (the document's first, the most recent)
    distance  counts by distance from the own block, in blocks: 0, 1, 2-3, 4-7, … (16 classes)
    """
    tokens = torch.arange(indices.shape[1], device=indices.device)
    document = torch.searchsorted(cu_seqlens, tokens.int(), right=True) - 1
    own = ((tokens - cu_seqlens[document]) // geometry.select_block).int()
    chosen = indices >= 0
    away = own[:, None] - indices
    forced = chosen & ((indices < geometry.num_initial) | (away < geometry.num_local))
    buckets = torch.where(away > 0, (away.clamp(min=1).float().log2().int() + 1), 0)
    distance = torch.bincount(buckets[chosen].clamp(max=15), minlength=16)
    shared = torch.zeros((), device=indices.device)
    follows = document[1:] == document[:-1]
    for start in range(0, len(follows), chunk):  # [Hkv, chunk, n, n]
        rows = slice(start, start + chunk)
        now, before = indices[:, 1:][:, rows, :, None], indices[:, :-1][:, rows, None, :]
        same = ((now == before) & (now >= 0)).any(-1) & follows[rows, None]
        shared += same.sum()
    later = (chosen[:, 1:] & follows[:, None]).sum()
    return {
        "overlap": shared / later.clamp(min=1),
        "forced": forced.sum() / chosen.sum().clamp(min=1),
        "distance": distance,
    }
