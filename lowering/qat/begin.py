"""Learned scales begin where rounding begins: at the end of the warmup, from the weights of then.

In: prepared modules, or a program, whose clocks have just been moved. Out: those whose warmup is over as of
now have the scales that `bf.prepare_qat` would begin with now.

    Qat("lsq", warmup=2):   advance; advance   ->   weight_step: the steps of the weight after two steps

Until then their gradients are 0, so that an optimizer has no moments to forget. Scales of activations stay
where calibration put them.

A step that a CUDA graph holds runs without this code: there the graph itself looks at the clock, and rounds
the weights once more in each step to have the scales at hand. Nothing here sees its clock move, so that a
call out of the graph asks the device from then on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.fx import GraphModule, Node

from ...formats import format
from ...formats.gradient import Gradient
from ...passes.stages import find_attribute
from ...passes.training.evaluated import evaluated
from ...passes.training.quantizers import CLOCK, TRAIN_QUANTIZE, learned_start
from .options import Qat
from .prepared import Prepared

COUNTED = "_bitfold_counted"
"""In a module: which clock was read last, its version then, and what it said; `CAPTURED` if a graph moves it,
which no version tells."""
CAPTURED = (None, 0, 0)


def begin_scales(found: Iterable[tuple[nn.Module, Qat]]) -> None:
    """Choose the learned scales of weights again where the warmup is over as of this step."""
    learning = ((module, how) for module, how in found if how.warmup and how.weight.learns)
    clocks = [(module, how, module._buffers.get(CLOCK)) for module, how in learning]
    waiting = [(module, how, clock) for module, how, clock in clocks if clock is not None]
    if not waiting:
        return
    if _captured([clock for *_, clock in waiting]):
        for module, how, clock in waiting:
            module.__dict__[COUNTED] = CAPTURED
            _begin(module, how, clock == how.warmup)
        return
    counts = _counts([(module, clock) for module, _, clock in waiting])
    for (module, how, _), count in zip(waiting, counts, strict=True):
        if count == how.warmup:
            _begin(module, how, None)


def _captured(clocks: list[Tensor]) -> bool:
    """Whether what runs now is recorded into a CUDA graph, and happens when that is replayed."""
    return any(clock.is_cuda for clock in clocks) and torch.cuda.is_current_stream_capturing()


def _counts(clocks: list[tuple[nn.Module, Tensor]]) -> list[int]:
    """What clocks that have just been moved say. A device is asked, once for all, for those alone that
    something else wrote since (a state that was loaded, say) or that are new: in a run of steps for none, so
    that no step waits for the device."""
    known = [_known(module, clock) for module, clock in clocks]
    asked = [clock for (_, clock), count in zip(clocks, known, strict=True) if count is None]
    if asked:
        answers = iter(torch.stack([clock.to(asked[0].device) for clock in asked]).tolist())
        known = [next(answers) if count is None else count for count in known]
    counts = [int(count) for count in known if count is not None]
    for (module, clock), count in zip(clocks, counts, strict=True):
        if module.__dict__.get(COUNTED) != CAPTURED:
            module.__dict__[COUNTED] = (id(clock), clock._version, count)
    return counts


def _known(module: nn.Module, clock: Tensor) -> int | None:
    which, version, count = module.__dict__.get(COUNTED, CAPTURED)
    # One write since is the step that has just been counted.
    return count + 1 if which == id(clock) and clock._version == version + 1 else None


def _begin(module: nn.Module, how: Qat, when: Tensor | None) -> None:
    """Now, or if `when` says so on the device."""
    graph, held = _leaves(module)
    for node in graph.find_nodes(op="call_function", target=TRAIN_QUANTIZE):
        source, text, gradient, parts = node.args[:4]
        how_learned = Gradient.parse(str(gradient))
        if not parts or not how_learned.learns:
            continue
        numbers = evaluated(source, lambda leaf: _whole(held.get(leaf)))
        if numbers is None:
            continue  # an activation
        start = learned_start(format(str(text)), how_learned, numbers.contiguous(), how.start == "clip")
        # Numbers that are all 0 say nothing of a scale.
        told = start[0].abs() > torch.finfo(torch.float32).tiny
        told = told if when is None else told & when
        for part, new in zip(parts, start, strict=True):
            _put(held[part], torch.where(told, new, _whole(held[part])))


def _leaves(module: nn.Module) -> tuple[Any, dict[Node, Any]]:
    """The graph that evaluates, and what its leaves hold, but for what a call gives."""
    if isinstance(module, Prepared):
        graph = module.still.graph
        inputs = graph.find_nodes(op="placeholder")
        names = zip(inputs, module.operands, strict=False)
        return graph, {node: module._operand(name) for node, name in names}
    assert isinstance(module, GraphModule)
    found = module.graph.find_nodes(op="get_attr")
    return module.graph, {node: find_attribute(module, str(node.target)) for node in found}


def _whole(given: Any) -> Any:
    """A tensor with all of its numbers, if FSDP2 shards it."""
    return given.full_tensor() if isinstance(given, DTensor) else given


def _put(parameter: Tensor, numbers: Tensor) -> None:
    if isinstance(parameter, DTensor):
        numbers = distribute_tensor(numbers, parameter.device_mesh, parameter.placements)
    parameter.copy_(numbers)
