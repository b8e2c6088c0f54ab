"""Ranges of one model that several processes train: what any of them saw, all of them follow.

In: a model whose parameters FSDP2 shards, or around which DistributedDataParallel stands, and its prepared
modules. Out: in every process the extremes that the step's data had in all of them.

    process 0 saw [-1, 2], process 1 saw [-3, 1]   ->   [-3, 2] in both

One collective a step for all ranges together. A process alone, or a wrapper that is not known here, is left
as it is: a collective that other processes do not join would wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ...passes.training.quantizers import Range


def agree(model: nn.Module, ranges: Iterable[tuple[nn.Module, Range]]) -> None:
    """Widen what each range of these modules has seen to what it has seen in all processes that train
    `model`."""
    groups = _groups(model)
    if not groups:
        return
    # The least is asked of all, so that the upper ends go as their negatives.
    seen = [
        (module.get_buffer(name), sign)
        for module, one in ranges
        for name, sign in ((one.seen_low, 1.0), (one.seen_high, -1.0))
    ]
    if not seen:
        return
    device = seen[0][0].device
    ends = torch.stack([sign * buffer.reshape(()).to(device) for buffer, sign in seen])
    # A batch that is no number is one in all processes, and moves no range in any.
    ends = torch.where(ends.isnan(), -torch.inf, ends)
    for group in groups:
        dist.all_reduce(ends, dist.ReduceOp.MIN, group)
    for (buffer, sign), end in zip(seen, ends.unbind(), strict=True):
        buffer.copy_(sign * end)


def _groups(model: nn.Module) -> list[Any]:
    """The groups of processes over which the model's data are spread, in one order everywhere."""
    meshes = {p.device_mesh: None for p in model.parameters() if isinstance(p, DTensor)}
    found = [group for mesh in meshes for group in mesh.get_all_groups()]
    found += [one.process_group for one in model.modules() if isinstance(one, DistributedDataParallel)]
    return [group for group in dict.fromkeys(found) if dist.get_world_size(group) > 1]
