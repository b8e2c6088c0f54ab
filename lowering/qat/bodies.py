"""The bodies of a prepared module: its graph as functions of its tensors, one for each mode.

In: the graph of a module's forward with roundings that train. Out: graphs without a tensor, whose leading
inputs are what the graph held, for `.train()` and for `.eval()`, and two more where a batch norm is folded in
that may be in the other mode.

    linear(x, train_quantize(weight, "int4", "lsq", [weight_step], False, ..))
    ->  body(weight, bias, weight_step, x), told True;  still(weight, bias, weight_step, x), told False
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ...formats.norm import FOLD, FREEZE, UNFOLD
from ...passes.stages import find_attribute
from ...passes.training.batch_norm import UNFOLD_NORM, switch_norms
from ...passes.training.evaluated import FOLD_NORM
from ...passes.training.freeze_norm import FREEZE_NORM
from ...passes.training.mode import TrainMode

Bodies = tuple[GraphModule, ...]
BODIES = {"body": (True, True), "still": (False, False), "frozen": (True, False), "moving": (False, True)}
"""Which body runs when the module, and the batch norm in it, are in training."""


def bodies_of(gm: GraphModule) -> tuple[Bodies, tuple[str, ...]]:
    """The bodies, and the attributes that are their leading inputs, in order."""
    made = []
    norms = bool(gm.graph.find_nodes(op="call_function", target=UNFOLD_NORM))
    for training, moves in BODIES.values():
        if training != moves and not norms:
            continue
        body, attributes = _lifted(gm)
        TrainMode(on=training).apply(body)
        switch_norms(body, moves)
        body.meta.clear()
        body.recompile()
        made.append(body)
    return tuple(made), attributes


NORM_NUMBERS = ("norm.momentum", "norm.eps")
"""Inputs of the bodies that are no tensors: a schedule, or torch.optim.swa_utils.update_bn, changes them."""
_NUMBERS: dict[Any, dict[int, str]] = {
    operator: {places[name]: f"norm.{name}" for name in ("momentum", "eps") if name in places}
    for operator, places in ((FOLD_NORM, FOLD), (UNFOLD_NORM, UNFOLD), (FREEZE_NORM, FREEZE))
}


def _lifted(gm: GraphModule) -> tuple[GraphModule, tuple[str, ...]]:
    """`gm` without a tensor and without meta: its attributes, and a batch norm's numbers, come first among
    the inputs."""
    reads = [node for node in gm.graph.nodes if node.op == "get_attr"]
    attributes = tuple(dict.fromkeys(str(node.target) for node in reads))
    if any(node.target in _NUMBERS for node in gm.graph.nodes):
        attributes = (*attributes, *NORM_NUMBERS)
    graph = Graph()
    inputs = {name: graph.placeholder(name.replace(".", "_")) for name in attributes}
    moved: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            assert isinstance(find_attribute(gm, str(node.target)), Tensor)
            moved[node] = inputs[str(node.target)]
            continue
        if node.op in ("placeholder", "output"):
            moved[node] = graph.node_copy(node, moved.__getitem__)
        else:
            # Named by what it does, not by the layer's path, so that layers that are alike share a body.
            args, kwargs = map_arg((node.args, node.kwargs), moved.__getitem__)
            for place, name in _NUMBERS.get(node.target, {}).items():
                args = (*args[:place], inputs[name], *args[place + 1 :])
            moved[node] = graph.create_node(node.op, node.target, args, kwargs)
        moved[node].meta = {}
    return GraphModule(nn.Module(), graph), attributes
