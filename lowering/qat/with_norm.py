"""The graph of a convolution with the batch norm behind it, which is another module's.

In: the graph of a convolution that trains rounded, and a batch norm. Out: the graph of both, the batch norm
folded into the weight before that is rounded.

    conv2d(x, rounded(weight))  ->  batch_norm(conv2d(x, rounded(weight)), norm.weight, norm.bias, ..)  ->  ..
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ...passes import Pipeline, capture_module
from ...passes.annotate import Annotate
from ...passes.edit import call, fake_mode
from ...passes.note import annotated
from ...passes.recipes import Recipe
from .options import Qat
from .passes_of import norm_pass

aten = torch.ops.aten
PREFIX = "norm"
"""Under which the graph of a convolution knows the tensors of its batch norm."""
NAMES = ("weight", "bias", "running_mean", "running_var")
MOMENTUM = 0.1
"""Stands for that of the module, which may change as it trains: what is prepared takes it as an input."""


def with_norm(gm: GraphModule, norm: nn.Module, how: Qat, *, loaded: bool = False) -> bool:
    """Put batch norm behind the convolution of a graph that trains, and fold it in; False if it stays out,
    since the result is rounded before batch norm reads it."""
    (conv,) = (node for node, _ in annotated(gm))
    users = list(conv.users)
    if len(users) != 1 or users[0].op != "output":
        return False
    gm.add_submodule(PREFIX, _held(norm))
    first = next(iter(gm.graph.nodes))
    read = [_attribute(gm, f"{PREFIX}.{name}", first) for name in NAMES if getattr(norm, name) is not None]
    numbers = dict[str, Node | None](dict.fromkeys(NAMES)) | {
        str(node.target).split(".")[1]: node for node in read
    }
    told: Any = norm
    args = (conv, *numbers.values(), False, MOMENTUM, told.eps, False)
    after = call(gm, aten.batch_norm.default, args, before=users[0], origin_from=conv)
    conv.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    folded = Pipeline([norm_pass(how, loaded=loaded)]).run(gm, record=False).steps[-1].rewrites
    assert folded == 1, f"the batch norm behind {conv.name} did not fold"
    return True


def _held(norm: nn.Module) -> nn.Module:
    """Its tensors, the very ones, without its code."""
    holder = nn.Module()
    for name in NAMES[:2]:
        holder.register_parameter(name, norm._parameters[name])
    for name in NAMES[2:]:
        holder.register_buffer(name, norm._buffers[name])
    return holder


def _attribute(gm: GraphModule, target: str, before: Node) -> Node:
    with gm.graph.inserting_before(before):
        node = gm.graph.create_node("get_attr", target, name=target.replace(".", "_"))
    owner, _, name = target.rpartition(".")
    tensor = getattr(gm.get_submodule(owner), name)
    with fake_mode(gm):
        node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return node


def identity(path: str) -> GraphModule:
    """The graph x -> x, annotated by nothing."""
    gm = capture_module(nn.Identity(), (torch.zeros(2, 2),), path=path)
    Pipeline([Annotate(recipe=str(Recipe("none", ())))]).run(gm, record=False)
    return gm
