"""Edges: where a format sits between two nodes, and how a node is put there.

In: an annotated graph and a way to make the node.  Out: that node on each annotated activation edge, its
users rewired; layers that read the same value in the same format share one.

    %q = linear(%x, ..); %k = linear(%x, ..)   ->   %n = node(%x); %q = linear(%n, ..); %k = linear(%n, ..)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from .anchors import TARGETS
from .joints import Operands, operands
from .note import Note, annotated

EDGE = "bitfold_edge"
"""In `node.meta` of an observer, a fake-quantize or a dequantize node: the `Edge` that it stands on."""


@dataclass(frozen=True)
class Edge:
    """One operand of a layer, and the format that it takes."""

    layer: str
    which: str  # weight | input | output
    format: str
    observer: str = ""
    stored: str = ""  # of a weight: where the user's own codes are kept, if those are to be taken


MakeNode = Callable[[Edge, Node, Node], Node]
"""(edge, value, before) -> a node for `value`, placed before `before`."""


def edge(node: Node) -> Edge | None:
    """The edge on which `node` stands, if it does."""
    found = node.meta.get(EDGE)
    return found if isinstance(found, Edge) else None


def split_activations(gm: GraphModule, make: MakeNode, *, observed_only: bool = False) -> int:
    """Put a node on every annotated activation edge that has none yet; return how many were made."""
    shared: dict[tuple[Node, str, str, int], Node] = {}
    since = epochs(gm)

    def place(on: Edge, value: Node, before: Node) -> Node:
        key = (value, on.format, on.observer, since.get(before, -1))
        if key not in shared:
            shared[key] = make(on, value, before)
            shared[key].meta[EDGE] = on
        return shared[key]

    for node, note in annotated(gm):
        if note.observer or not observed_only:
            _split_input(node, note, place)
            _split_output(node, note, place)
    for node in list(gm.graph.nodes):
        wanted = operands(node)
        if wanted is not None and (wanted.observer or not observed_only):
            _split_operands(node, wanted, place)
    return len(shared)


def first_calibrated(gm: GraphModule) -> str | None:
    """The first layer, or joint, that wants ranges found on data."""
    for _, note in annotated(gm):
        if note.observer:
            return note.layer
    wanted = (operands(node) for node in gm.graph.nodes)
    return next((one.layer for one in wanted if one is not None and one.observer), None)


def epochs(gm: GraphModule) -> dict[Node, int]:
    """For each node, how many up to it write to a tensor or switch a mode; within an epoch all may move."""
    count, found = 0, {}
    for node in gm.graph.nodes:
        count += _writes(node)
        found[node] = count
    return found


def _writes(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return "val" not in node.meta


def _split_input(node: Node, note: Note, place: MakeNode) -> None:
    if not note.input:
        return
    index = TARGETS[node.target][1]
    value = node.args[index]
    assert isinstance(value, Node)
    there = edge(value)
    if there is None or there.format != note.input:
        node.update_arg(index, place(Edge(note.layer, "input", note.input, note.observer or ""), value, node))


def _split_operands(node: Node, wanted: Operands, place: MakeNode) -> None:
    for index in wanted.places:
        value = node.args[index]
        assert isinstance(value, Node)
        there = edge(value)
        if there is None or there.format != wanted.format:
            on = Edge(wanted.layer, "input", wanted.format, wanted.observer)
            node.update_arg(index, place(on, value, node))


def _split_output(node: Node, note: Note, place: MakeNode) -> None:
    if not note.output or any((there := edge(user)) and there.which == "output" for user in node.users):
        return
    users = list(node.users)
    new = place(Edge(note.layer, "output", note.output, note.observer or ""), node, node.next)
    for user in users:
        user.replace_input_with(node, new)
