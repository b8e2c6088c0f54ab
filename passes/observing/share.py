"""Share: edges that hold the same numbers have one scale, and what is joined has the scale of the whole.

In: an observed graph. Out: the same graph, in which observers of such edges agree on a range.

    %v = flatten(%x); observer(%x), observer(%v)              one range: these are the same numbers
    %c = cat([%a, %b]); observer(%a), observer(%c)            one range: the codes of %a are part of %c's
    %s = add(%a, %b); observer(%a), observer(%b)              with add=true: integers are added as they are

The first two are always done: a range is never smaller for it than what passes through, and codes can then be
moved and concatenated as they are. `add` is asked for: a kernel that adds two scaled numbers needs no common
scale, and the operand of smaller range pays for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..core import Pass
from ..edges import edge
from ..moves import source_of
from ..stages import Stage, find_attribute
from .observers import Agreed, Observer

aten = torch.ops.aten
_JOINS = (aten.cat.default, aten.concat.default, aten.stack.default)


@dataclass(frozen=True)
class Share(Pass):
    """add: whether the operands of an addition agree too."""

    name: ClassVar[str] = "share"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.observed,)
    produces: ClassVar[Stage | None] = Stage.observed

    add: bool = False

    def apply(self, gm: GraphModule) -> int:
        """Number of edges that have another's range now."""
        observed = list(_observed(gm))
        groups = _Groups([node for node, _ in observed])
        by_source: dict[tuple[Node, str], Node] = {}
        for node, fmt in observed:
            first = by_source.setdefault((source_of(node.all_input_nodes[0]), fmt), node)
            groups.join(first, node)
        for joint, parts in _joints(gm, add=self.add):
            formats = {fmt for _, fmt in by_source}
            for fmt in formats:
                members = [by_source.get((source_of(part), fmt)) for part in (joint, *parts)]
                held = [member for member in members if member is not None]
                # What nobody rounds as a whole leaves its parts alone.
                if len(held) > 1 and members[0] is not None:
                    for member in held[1:]:
                        groups.join(held[0], member)
        return sum(_agree(gm, group) for group in groups.of_several())


def _observed(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    """Nodes that observe, and the format of their edge."""
    for node in gm.graph.nodes:
        on = edge(node)
        if on is not None and node.op == "call_module":
            yield node, on.format


def _joints(gm: GraphModule, *, add: bool) -> Iterator[tuple[Node, list[Node]]]:
    """Nodes that put tensors together, and those tensors. An addition's own result has a range of its own."""
    for node in gm.graph.nodes:
        if node.target in _JOINS:
            yield node, list(node.all_input_nodes)
        if add and node.target in (aten.add.Tensor, aten.add_.Tensor):
            parts = [part for part in node.all_input_nodes if isinstance(part.meta.get("val"), Tensor)]
            if len(parts) == 2:
                yield parts[0], parts[1:]


class _Groups:
    """Nodes that belong together: each knows one of its group."""

    def __init__(self, nodes: list[Node]) -> None:
        self.one = {node: node for node in nodes}

    def first(self, node: Node) -> Node:
        while self.one[node] is not node:
            node = self.one[node]
        return node

    def join(self, one: Node, other: Node) -> None:
        self.one[self.first(other)] = self.first(one)

    def of_several(self) -> Iterator[list[Node]]:
        found: dict[Node, list[Node]] = {}
        for node in self.one:
            found.setdefault(self.first(node), []).append(node)
        yield from (group for group in found.values() if len(group) > 1)


def _agree(gm: GraphModule, group: list[Node]) -> int:
    observers = [find_attribute(gm, str(node.target)) for node in group]
    own = [found for found in observers if isinstance(found, Observer)]
    for node, found in zip(group, own, strict=True):
        gm.set_submodule(str(node.target), Agreed(found, own))
    return len(group) - 1
