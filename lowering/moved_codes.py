"""Codes instead of numbers: a `quantize` with a static scale moves up past what only moves numbers.

In: a lowered graph. Out: the same codes, made earlier, so that the kernel before can write them itself.

    %f = flatten(%x, 1); %q = quantize(%f, "int8[tensor]", [%s]); f(%q[0])
    ->  %q = quantize(%x, "int8[tensor]", [%s]); %f = flatten(%q[0], 1); f(%f)

Nothing moves that is read as a float too.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..formats import Integer, format
from ..passes import inherit
from ..passes.edges import epochs

aten = torch.ops.aten
QUANTIZE = torch.ops.bitfold.quantize.default
# Of one tensor, whatever its numbers are.
MOVES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.permute.default,
        aten.transpose.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.contiguous.default,
        aten.channel_shuffle.default,
        aten.pixel_shuffle.default,
        aten.slice.Tensor,
        aten.select.int,
    }
)


def static(node: Node) -> bool:
    """Whether a node quantizes to int8 with one scale that the graph holds."""
    if node.target is not QUANTIZE or len(node.args) < 3 or not node.args[2]:
        return False
    fmt = format(str(node.args[1]))
    scales: Any = node.args[2]
    plain = fmt.element == Integer(8) and fmt.scale is not None and fmt.parts == ("codes", "scales")
    held = len(scales) == 1 and scales[0].op in ("placeholder", "get_attr")
    return plain and held and str(fmt) == "int8[tensor]"


def scale_of(quantize: Node) -> Node:
    """The scale of a static `quantize`."""
    scales: Any = quantize.args[2]
    found: Node = scales[0]
    return found


def move_codes(gm: GraphModule) -> int:
    """Number of operations that work on codes now. Each `quantize` with a static scale has one reader of
    its codes, and its scale is read where it is held, afterwards."""
    since = epochs(gm)
    for node in gm.graph.find_nodes(op="call_function", target=QUANTIZE):
        if static(node):
            _plain_scale(gm, node)
    _once(gm, since)
    found = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=QUANTIZE)):
        while static(node) and (up := _moved(gm, node, since)) is not None:
            node, found = up, found + 1
    _once(gm, since)
    return found


def _plain_scale(gm: GraphModule, quantize: Node) -> None:
    """Readers of the scale among a quantize's parts read it itself; those of codes share one node."""
    codes: Node | None = None
    for part in list(quantize.users):
        if part.args[1] == 1:
            part.replace_all_uses_with(scale_of(quantize))
            gm.graph.erase_node(part)
        elif codes is None:
            codes = part
        else:
            part.replace_all_uses_with(codes)
            gm.graph.erase_node(part)


def _once(gm: GraphModule, since: dict[Node, int]) -> None:
    """One `quantize` of one value by one scale, for all readers."""
    made: dict[tuple[object, ...], Node] = {}
    for node in list(gm.graph.find_nodes(op="call_function", target=QUANTIZE)):
        if not static(node):
            continue
        scale = scale_of(node)
        held = (scale.op, scale.target)
        first = made.setdefault((node.args[0], node.args[1], held, since.get(node)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            _plain_scale(gm, first)


def _moved(gm: GraphModule, quantize: Node, since: dict[Node, int]) -> Node | None:
    """The `quantize` of what was moved, which now stands before the move; None if it stays."""
    move = quantize.args[0]
    if not isinstance(move, Node) or set(move.users) != {quantize} or not quantize.users:
        return None
    if move.target not in MOVES or since.get(move) != since.get(quantize):
        return None
    source, *rest = move.args
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    (codes,) = quantize.users
    scale = scale_of(quantize)
    graph, made = gm.graph, list[Node]()

    def add(target: Any, args: tuple[Any, ...], like: Node, kwargs: Any = None) -> Node:
        node = graph.call_function(target, args, kwargs or {})
        node.meta["val"] = like.meta["val"].to(torch.uint8)
        made.append(node)
        return node

    with graph.inserting_before(quantize):
        new = graph.call_function(QUANTIZE, (source, quantize.args[1], [scale]))
        new.meta["val"] = [source.meta["val"].to(torch.uint8), scale.meta["val"]]
        made.append(new)
        value = add(operator.getitem, (new, 0), source)
        value = add(move.target, (value, *rest), move, dict(move.kwargs))
    for node in made:
        inherit(node, [move, quantize])
        since[node] = since[quantize]
    codes.replace_all_uses_with(value)
    for old in (codes, quantize, move):
        graph.erase_node(old)
    return new
