"""Where DeepSpeed keeps each parameter's fp32 value and optimizer state on this rank.

Every ZeRO stage cuts the parameters its own way. Seen as pieces (parameter, first element, values),
they are all alike, and a checkpoint written under one stage and number of ranks fits any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Piece(NamedTuple):
    """Elements start … start + numel - 1 of parameter `name`, flattened, which live in
    `flat`[offset : offset + numel]; `state` holds the optimizer's tensors, shaped like `flat`."""

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int
    state: dict


def pieces(engine) -> Iterator[Piece]:
    """What this rank holds, in the order of the model's parameters."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    for name, p in engine.module.named_parameters():
        if stage == 0:
            master = optimizer.masters[p]
            yield Piece(name, 0, p.numel(), master, 0, optimizer.state_of(master))
        elif stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            flat, start = optimizer.fp32_partitioned_groups_flat[group], dist.get_rank() * size
            numel = min(size, p.ds_numel - start)  # the last rank's piece may end in padding
            if numel > 0:
                yield Piece(name, start, numel, flat, offset, optimizer.optimizer.state[flat])
        elif (found := p._hp_mapping) is not None:
            flat = _flat_groups(optimizer)[found.param_group_index]
            there, here = found.lp_fragment_address, found.hp_fragment_address
            state = optimizer.optimizer.state[flat]
            yield Piece(name, there.start, there.numel, flat, here.start, state)


def _flat_groups(optimizer) -> list[Tensor]:
    """ZeRO-1 in bf16 is another class of DeepSpeed's than ZeRO-1 in fp32 and ZeRO-2."""
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


@torch.no_grad()
def refresh(engine) -> None:
    """Make the model's parameters follow the fp32 values. All ranks call it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        optimizer.refresh()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer._post_step(set())
    else:
        optimizer.update_lp_params()
