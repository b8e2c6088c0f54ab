"""Values of a graph that share memory, as far as its operators and its inputs' storages tell.

In: a graph, and a node of it that writes, or a part of its nodes. Out: who else sees what the node writes;
whether the part, as a graph of its own, would write to memory that two of its inputs share. Whoever compiles
it for one such part would not know that another's inputs do.

    %v = view(%c); | add_(%c, 1); sin(%v)    ->   True: %c and %v, both from before the cut
    add_(%c, 1); %v = view(%c); sin(%v)      ->   False: the view is made inside, where all see it
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
RETURNS_ITS_INPUT: frozenset[object] = frozenset(
    {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
)
"""Composite operators that may return what they were given, whatever their schema says."""


def memory(graph: Graph) -> dict[Node, object]:
    """Equal for nodes that may share memory: views have that of what they are views of."""
    found: dict[Node, object] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        base = _base(node)
        if base is not None:
            found[node] = found[base]
        elif node.op == "placeholder" and isinstance(value, Tensor):
            found[node] = value.untyped_storage()._cdata
        else:
            found[node] = node
    return found


def writes_shared(nodes: Iterable[Node], inputs: Iterable[Node], memory: dict[Node, object]) -> bool:
    """Whether `nodes` write to memory that more than one of `inputs` has."""
    written = {memory[given] for node in nodes for given in _written(node)}
    shared = [memory[given] for given in inputs if memory[given] in written]
    return len(shared) != len(set(shared))


def written(nodes: Iterable[Node], inputs: Iterable[Node], memory: dict[Node, object]) -> list[Node]:
    """Those of `inputs` whose memory `nodes` write to."""
    found = {memory[given] for node in nodes for given in _written(node)}
    return [given for given in inputs if memory[given] in found]


def sees_write(node: Node, memory: dict[Node, object]) -> Node | None:
    """Who else sees what `node` writes to its first argument: an argument of the graph or an attribute that
    this lies in, or who reads its memory later, and not by way of the result."""
    target = node.all_input_nodes[0]
    held = memory[target]
    if not isinstance(held, Node) or held.op != "call_function":
        return next(one for one in memory if memory[one] == held)
    nodes: list[Node] = list(node.graph.nodes)
    result = {node}
    for later in nodes[nodes.index(node) + 1 :]:
        given = [one for one in later.all_input_nodes if memory[one] == held]
        if later.target is aten.copy_.default and later.args[1] in result:
            return None  # x[:, :4] += y, which puts the result back: from here on the memory itself has it
        if not given:
            continue
        if all(one in result for one in given):
            if memory[later] == held:
                result.add(later)
        elif memory[later] != held or _written(later):
            return later
    return None


def _base(node: Node) -> Node | None:
    """The argument that a node's result may be a view of."""
    if node.target is operator.getitem or node.target in RETURNS_ITS_INPUT:
        return node.all_input_nodes[0]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    results = [result.alias_info for result in node.target._schema.returns if result.alias_info is not None]
    names = {name for told in results for name in told.before_set | told.after_set}
    for argument, given in _arguments(node):
        told = argument.alias_info
        # What becomes "*" is in a list of results.
        viewed = told is not None and ("*" in told.after_set or told.before_set & names)
        if viewed and (nodes := _nodes(given)):
            return nodes[0]
    return None


def _written(node: Node) -> list[Node]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    given = [
        value for argument, value in _arguments(node) if argument.alias_info and argument.alias_info.is_write
    ]
    return [one for value in given for one in _nodes(value)]


def _arguments(node: Node) -> Iterator[tuple[torch.Argument, object]]:
    """Each argument of the operator's schema that is given, and what is given."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            yield argument, node.args[i]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(value, found.append)
    return found
