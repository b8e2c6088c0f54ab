"""Codes instead of numbers: a `quantize` with a static scale moves up past what only moves numbers.

In: a lowered graph. Out: the same codes, made earlier, so that the kernel before can write them itself.

    %f = flatten(%x, 1); %q = quantize(%f, "int8[tensor]", [%s]); f(%q[0])
    ->  %q = quantize(%x, "int8[tensor]", [%s]); %f = flatten(%q[0], 1); f(%f)

    %c = cat([%a, %b], 1); %q = quantize(%c, "int8[tensor]", [%s])
    ->  %p = quantize(%a, .., [%s]); %q = quantize(%b, .., [%s]); %c = cat([%p[0], %q[0]], 1)

Nothing moves that is read as a float too. Scales of equal number are one scale: `share` made them so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from ...codegen.conv import one_scale
from ...formats import format
from ...passes import inherit
from ...passes.edges import epochs
from ...passes.moves import REORDERS
from ...passes.stages import find_attribute

aten = torch.ops.aten
QUANTIZE = torch.ops.bitfold.quantize.default
# Of one tensor, whatever its numbers are.
MOVES = REORDERS | {aten.slice.Tensor, aten.select.int}
JOINS = frozenset({aten.cat.default, aten.concat.default, aten.stack.default})


def static(node: Node) -> bool:
    """Whether a node quantizes to int8 with one scale, and perhaps a zero point, that the graph holds."""
    if node.target is not QUANTIZE or len(node.args) < 3 or not node.args[2]:
        return False
    fmt = format(str(node.args[1]))
    scales: Any = node.args[2]
    held = len(scales) + 1 == len(fmt.parts) and all(one.op in ("placeholder", "get_attr") for one in scales)
    return held and one_scale(fmt)


def scales_of(quantize: Node) -> list[Node]:
    """The scale of a static `quantize`, and its zero point if it has one."""
    scales: Any = quantize.args[2]
    return list(scales)


def move_codes(gm: GraphModule) -> int:
    """Number of operations that work on codes now. Each `quantize` with a static scale has one reader of
    its codes, and its scale is read where it is held, afterwards."""
    since = epochs(gm)
    for node in gm.graph.find_nodes(op="call_function", target=QUANTIZE):
        if static(node):
            _plain_scale(gm, node)
    _once(gm, since)
    found = 0
    pending = list(gm.graph.find_nodes(op="call_function", target=QUANTIZE))
    while pending:
        node = pending.pop()
        if static(node) and (up := _moved(gm, node, since) or _joined(gm, node, since)):
            pending += up
            found += 1
    _once(gm, since)
    return found


def _plain_scale(gm: GraphModule, quantize: Node) -> None:
    """Readers of the scale (and zero point) among a quantize's parts read it itself; those of codes share one
    node."""
    codes: Node | None = None
    for part in list(quantize.users):
        place: Any = part.args[1]
        if place > 0:
            part.replace_all_uses_with(scales_of(quantize)[place - 1])
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
        held = tuple(_number(gm, one) for one in scales_of(node))
        first = made.setdefault((node.args[0], node.args[1], held, since.get(node)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            _plain_scale(gm, first)


def _number(gm: GraphModule, scale: Node) -> Any:
    """What tells one scale from another: its number where the graph holds it, else where it comes from."""
    value: Any = find_attribute(gm, str(scale.target)) if scale.op == "get_attr" else None
    if type(value) in (Tensor, Parameter) and value.numel() == 1 and not value.is_meta:
        return float(value)
    return scale.op, scale.target


def _moved(gm: GraphModule, quantize: Node, since: dict[Node, int]) -> list[Node]:
    """The `quantize` of what was moved, which now stands before the move; none if it stays."""
    move = _only_read_by(quantize, since)
    if move is None or move.target not in MOVES or not isinstance(move.args[0], Node):
        return []
    source, *rest = move.args
    return _replaced(gm, quantize, move, [source], lambda codes: (codes[0], *rest), since)


def _joined(gm: GraphModule, quantize: Node, since: dict[Node, int]) -> list[Node]:
    """A `quantize` for each part of what was put together; none if it stays."""
    joint = _only_read_by(quantize, since)
    if joint is None or joint.target not in JOINS or not isinstance(joint.args[0], list | tuple):
        return []
    parts: Any = joint.args[0]
    rest = joint.args[1:]
    return _replaced(gm, quantize, joint, list(parts), lambda codes: (codes, *rest), since)


def _only_read_by(quantize: Node, since: dict[Node, int]) -> Node | None:
    """What is quantized, if nobody else reads it and nothing is written in between."""
    move = quantize.args[0]
    if not isinstance(move, Node) or set(move.users) != {quantize} or not quantize.users:
        return None
    return move if since.get(move) == since.get(quantize) else None


def _replaced(
    gm: GraphModule,
    quantize: Node,
    move: Node,
    sources: list[Any],
    arguments: Callable[[list[Node]], tuple[Any, ...]],
    since: dict[Node, int],
) -> list[Node]:
    """`quantize` after `move` -> one before it for each source, and the move on their codes."""
    dtypes = {source.meta["val"].dtype for source in sources if _is_tensor(source)}
    if not all(map(_is_tensor, sources)) or dtypes != {move.meta["val"].dtype}:
        return []
    (codes,) = quantize.users
    scales = scales_of(quantize)
    graph, made = gm.graph, list[Node]()

    def add(target: Any, args: tuple[Any, ...], like: Node, kwargs: Any = None) -> Node:
        node = graph.call_function(target, args, kwargs or {})
        node.meta["val"] = like.meta["val"].to(torch.uint8)
        made.append(node)
        return node

    news, held = list[Node](), list[Node]()
    with graph.inserting_before(quantize):
        for source in sources:
            new = graph.call_function(QUANTIZE, (source, quantize.args[1], scales))
            new.meta["val"] = [source.meta["val"].to(torch.uint8), *(one.meta["val"] for one in scales)]
            made.append(new)
            news.append(new)
            held.append(add(operator.getitem, (new, 0), source))
        value = add(move.target, arguments(held), move, dict(move.kwargs))
    for node in made:
        inherit(node, [move, quantize])
        since[node] = since[quantize]
    codes.replace_all_uses_with(value)
    for old in (codes, quantize, move):
        graph.erase_node(old)
    return news


def _is_tensor(given: object) -> bool:
    return isinstance(given, Node) and isinstance(given.meta.get("val"), Tensor)
