"""The schedule of training on rounded numbers: what a step moves on, and what an optimizer is told.

In: a prepared model or program. Out: its clocks one step on, its ranges moved; parameter groups.

    optimizer = torch.optim.AdamW(bf.parameter_groups(model, lr=1e-4, scale_lr=1e-3))
    for batch in batches: loss(model(batch)).backward(); optimizer.step(); bf.advance(model)

All of it is numbers in buffers, which `state_dict` holds: a run that is resumed goes on where it was, and a
compiled step is never compiled again. Within a step the ranges stand still, so that accumulated gradients and
recomputed activations see the same ones. Processes that train one model see the extremes of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ...formats import BitfoldError
from ...passes.training.quantizers import CLOCK, Range
from ..given_model import module_of
from .agree import agree
from .begin import begin_scales
from .options import Qat
from .preparation import PROGRAM, program_of
from .prepared import Prepared, check_norms


def advance(model: nn.Module) -> None:
    """One step is done: count it, and move the ranges that follow the data; after `optimizer.step()`. Learned
    scales of weights begin anew in the last step of the warmup.

    Ranges follow the data of all processes where FSDP2 shards the model, or where `model` is the
    DistributedDataParallel around it; every process then calls this after every step.
    """
    model = module_of(model, "bf.advance")
    found = list(_prepared(model))
    if not found:
        raise BitfoldError(f"nothing in this {type(model).__name__} is prepared; call bf.prepare_qat first")
    check_norms(model)
    following = [(held.module, one, held.options) for held in found for one in held.ranges]
    with torch.no_grad():
        agree(model, [(module, one) for module, one, _ in following])
        for module, one, how in following:
            _move(module, one, how)
        for held in found:
            clock = held.module._buffers.get(CLOCK)
            if clock is not None:
                clock += 1
        begin_scales((held.module, held.options) for held in found)


def parameter_groups(
    model: nn.Module, lr: float, scale_lr: float | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the model's own parameters at `lr` with `options`, and the learned scales
    at `scale_lr` (by default lr) without weight decay. Parameters that do not train are left out."""
    scales = {id(one.module._parameters.get(name)) for one in _prepared(model) for name in one.extra}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if id(p) not in scales], "lr": lr, **options}]
    learning = [p for p in trained if id(p) in scales]
    if learning:
        rate = lr if scale_lr is None else scale_lr
        groups.append({"params": learning, **options, "lr": rate, "weight_decay": 0.0})
    return groups


@dataclass(frozen=True)
class _Scheduled:
    """A module, or the program, that holds a clock or ranges: its options, the names of what training added
    to it, and its ranges that follow the data."""

    module: nn.Module
    options: Qat
    extra: tuple[str, ...]
    ranges: tuple[Range, ...]


def _prepared(model: nn.Module) -> Iterator[_Scheduled]:
    for module in model.modules():
        if isinstance(module, Prepared):
            yield _Scheduled(module, module.preparation.options, module.extra, module.preparation.ranges)
        elif isinstance(module, GraphModule) and PROGRAM in module.meta:
            about = program_of(module)
            yield _Scheduled(module, about.options, about.extra, about.ranges)


def _move(module: nn.Module, one: Range, how: Qat) -> None:
    """A range `rate` of the way to what it has seen in this step, while the data are followed."""
    following = module.get_buffer(CLOCK) < how.observe
    for end, seen_by, sign in ((one.low, one.seen_low, 1.0), (one.high, one.seen_high, -1.0)):
        held, seen = module.get_buffer(end), module.get_buffer(seen_by)
        new = seen.reshape(held.shape)
        # The first range is the first data's; a step without data moves nothing.
        moved = torch.where(held.isfinite(), held + how.rate * (new - held), new)
        held.copy_(torch.where(following & new.isfinite(), moved, held))
        seen.fill_(sign * torch.inf)
