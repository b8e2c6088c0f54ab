"""Fold batch norm: an affine map a channel, known ahead, goes into the convolution or product before it.

In: a captured graph of a model in eval mode. Out: the same with fewer operators: a weight and a bias in
place of each batch norm with running statistics that alone reads such a result.

    %y = conv2d(%x, %w); %z = batch_norm(%y, %gamma, %beta, %mean, %var, False, 0.1, 1e-05, ..)
    ->  %z = conv2d(%x, %w', %b')

    g = gamma / sqrt(var + eps);  w' = w g, a row each;  b' = (b - mean) g + beta

Both are computed in float64 and rounded to the parameter's dtype once, so they are the same in every bit on
every machine; what follows from them is within rounding of the model's own numbers, and no further: codes
of w' are other codes than those of w. That is why no recipe does it by itself. Without this pass the CPU's
kernels apply the same map to their sums, which costs them a multiplication and an addition a number
(`lowering/cpu/conv_chain.py`), in all scopes alike, and leaves codes what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .cleanup import erase_dead_nodes
from .constants import constant, erase_dead_constants, expression
from .core import Miss, Pass, report, state
from .edit import arguments, fake_mode, free_name
from .provenance import inherit
from .stages import Stage

aten = torch.ops.aten
# Operators whose result's second dimension is the weight's first one.
ROWS_FIRST = frozenset(
    {
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
    }
)


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Has no options: what cannot be folded is reported."""

    name: ClassVar[str] = "fold_batch_norm"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.captured,)
    produces: ClassVar[Stage | None] = None

    def apply(self, gm: GraphModule) -> int:
        """Number of batch norms folded."""
        folded = 0
        for node in gm.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
            why = _obstacle(gm, node)
            if why is not None:
                report(gm, node, Miss(why), asked="fold_batch_norm")
                continue
            _fold(gm, node)
            folded += 1
        erase_dead_nodes(gm)
        erase_dead_constants(gm)
        return folded


def _obstacle(gm: GraphModule, node: Node) -> str | None:
    """Why a batch norm stays, or None."""
    x, _, _, mean, var, training, *_ = arguments(node)
    product = x.target is aten.linear.default and node.meta["val"].ndim == 2
    if training or mean is None or var is None:
        return "it normalizes by the statistics of its batch"
    if not product and x.target not in ROWS_FIRST:
        return "no convolution or product of rows stands before it"
    if set(x.users) != {node}:
        return f"'{x.name}' is read by others too"
    source = expression(gm, x.args[1])
    if source is None or not isinstance(source.parameter, nn.Parameter):
        return "the weight before it is no parameter"
    if state(gm).scope == "frame":
        return "parameters of a frame are the user's, who may change them"
    if source.path in state(gm).stored:
        return "the weight before it came in codes, which are kept"
    given = [value for value in (*arguments(node)[1:5], *x.args[2:3]) if isinstance(value, Node)]
    if any(constant(gm, value) is None for value in given):
        return "its numbers are not constant"
    return None


def _fold(gm: GraphModule, node: Node) -> None:
    x, gamma, beta, mean, var, _, _, eps, _ = arguments(node)
    weight, bias = x.args[1], x.args[2] if len(x.args) > 2 else None

    def value(given: Node | None, default: float) -> Tensor:
        found = None if given is None else constant(gm, given)
        return torch.tensor(default, dtype=torch.float64) if found is None else found.detach().double()

    numbers = constant(gm, weight)
    source = expression(gm, weight)
    assert numbers is not None and source is not None
    g = value(gamma, 1.0) / torch.sqrt(value(var, 1.0) + float(eps))
    rows = numbers.detach().double() * g.reshape(-1, *(1,) * (numbers.ndim - 1))
    shift = (value(bias, 0.0) - value(mean, 0.0)) * g + value(beta, 0.0)
    path = str(source.source.target)
    owner = path.rpartition(".")[0]
    new = parameter_at(gm, path, rows.to(numbers.dtype), x)
    added = parameter_at(gm, f"{owner}.bias" if owner else "bias", shift.to(numbers.dtype), x)
    x.args = (x.args[0], new, added, *x.args[3:])
    node.replace_all_uses_with(x)
    gm.graph.erase_node(node)
    inherit(x, [node])


def parameter_at(gm: GraphModule, path: str, numbers: Tensor, before: Node) -> Node:
    """A parameter at `path`, in the place of what is there if only `before` reads that, else beside it."""
    owner, _, name = path.rpartition(".")
    module: Any = gm.get_submodule(owner)
    readers = {user for node in gm.graph.find_nodes(op="get_attr", target=path) for user in node.users}
    if not readers <= {before}:
        name = free_name(module, f"{name}_normed")
    if hasattr(module, name):
        delattr(module, name)
    module.register_parameter(name, nn.Parameter(numbers.contiguous(), requires_grad=False))
    target = f"{owner}.{name}" if owner else name
    with gm.graph.inserting_before(before):
        node = gm.graph.create_node("get_attr", target, (), {}, name=free_name(gm, target))
    with fake_mode(gm):
        node.meta["val"] = torch.empty(numbers.shape, dtype=numbers.dtype, device=numbers.device)
    return inherit(node, [before])
