"""Stretches of a graph that repeat, layer after layer, are compiled once and called once for each.

In: a lowered graph, and what compiles one. Out: what runs it: the part before, thirty calls of one compiled
layer, the part behind. None if nothing in the graph repeats.

    %a = embed(%i); %b = norm(%a, %w0); %c = fused([%b, ..]); .. 30 times ..; %z = head(%y)
    ->  before(i) -> a;  layer(a, w0, ..) -> c;  layer(c, w1, ..) -> ..;  behind(y) -> z

Nothing is known of layers here: the sequence of operators, constants and shapes is looked at as text, and the
longest stretch that is its own continuation after `period` nodes is cut where the fewest values pass. Nodes
stay in order, so writes to caches happen where they did; a graph is left whole if a stretch writes to memory
that two of its inputs share, since those of another layer may not.

The C++ that calls the kernels of thirty layers is one function that GCC takes minutes for; that of one layer
takes seconds. What it costs is that nothing is fused over the border of two layers, and a call from Python
for each.

Of a graph that does not repeat, the whole may be the one piece (`compile_alone`): a call of it then needs no
more of Python than a layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ...passes.shared_memory import memory, writes_shared, written
from ..shared_regions import alike, described
from ..target import Compiled
from .run_pieces import Run, Step, placed

# Fewer nodes than this are not worth a call from Python, which takes as long as a small kernel.
LEAST = 16
FEWEST = 3

Compile = Callable[[GraphModule, list[Any]], Compiled]


@dataclass(frozen=True)
class Repeat:
    """`count` stretches of `period` nodes, the first from `start` on, among nodes that are no inputs."""

    start: int
    period: int
    count: int


def compile_repeats(gm: GraphModule, compile: Compile) -> Run | None:
    """The graph in pieces, each compiled by `compile(piece, fake inputs)`; None if it does not repeat."""
    body = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    found = repeat(body) if _plain(gm) else None
    if found is None:
        return None
    edges = [found.start + found.period * i for i in range(found.count + 1)]
    cuts = [body[: edges[0]], *(body[a:b] for a, b in pairwise(edges)), body[edges[-1] :]]
    pieces = [_piece(gm, cut) for cut in cuts if cut]
    shared = memory(gm.graph)
    if any(writes_shared(piece.nodes, piece.inputs, shared) for piece in pieces):
        return None
    layers = [piece for piece in pieces if len(piece.nodes) == found.period]
    of_layers = {alike(piece.graph, kernels=True) for piece in layers}
    if len(of_layers) != 1 or None in of_layers:
        return None
    (layer,) = of_layers
    keys = [layer if len(piece.nodes) == found.period else id(piece) for piece in pieces]
    return _run(gm, pieces, keys, compile)


def compile_alone(gm: GraphModule, compile: Compile) -> Run | None:
    """The graph as one piece; None if sizes vary, or if inputs share what it writes to."""
    body = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    if not body or not _plain(gm):
        return None
    piece = _piece(gm, body)
    if writes_shared(piece.nodes, piece.inputs, memory(gm.graph)):
        return None
    return _run(gm, [piece], [0], compile)


def _run(gm: GraphModule, pieces: Sequence[_Piece], keys: Sequence[object], compile: Compile) -> Run:
    """What calls the pieces of a graph, those of one key being compiled once."""
    inputs = gm.graph.find_nodes(op="placeholder")
    places = {node: i for i, node in enumerate(inputs)}
    compiled: dict[object, Compiled] = {}
    steps: list[Step] = []
    for piece, key in zip(pieces, keys, strict=True):
        if key not in compiled:
            module = GraphModule(gm, piece.graph, class_name="Piece")
            compiled[key] = compile(module, [node.meta["val"] for node in piece.inputs])
        given = tuple(places[node] for node in piece.inputs)
        for node in piece.outputs:
            places[node] = len(places)
        steps.append(Step(compiled[key], given, tuple(places[node] for node in piece.outputs)))
    body = [node for piece in pieces for node in piece.nodes]
    changed = [places[node] for node in written(body, inputs, memory(gm.graph))]
    return Run(steps, placed(gm.graph.output_node().args[0], places), changed)


def repeat(body: Sequence[Node]) -> Repeat | None:
    """The longest repetition, cut where the fewest values pass from one stretch to the next."""
    words: dict[object, int] = {}
    text = np.array([words.setdefault(_word(node), len(words)) for node in body])
    best = (0, 0, 0)  # nodes, period, start
    for period in range(LEAST, len(body) // FEWEST + 1):
        same = np.concatenate([[False], text[period:] == text[:-period], [False]])
        ends = np.flatnonzero(same[1:] != same[:-1]).reshape(-1, 2)
        if len(ends) == 0:
            continue
        first, last = ends[np.argmax(ends[:, 1] - ends[:, 0])]
        if last - first + period > best[0] and last - first >= period * (FEWEST - 1):
            best = (int(last - first) + period, period, int(first))
    nodes, period, start = best
    if nodes == 0:
        return None
    passing = _passing(body, start)
    at = min(range(nodes % period + 1), key=lambda i: max(passing[start + i : start + nodes : period]))
    count = (nodes - at) // period
    return Repeat(start + at, period, count)


def _word(node: Node) -> object:
    """What a node computes, apart from which values it computes it of."""
    arguments = map_arg((node.args, node.kwargs), lambda _: None)
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return node.op, node.target, repr(arguments), tuple(repr(described(one)) for one in values)


def _passing(body: Sequence[Node], start: int) -> list[int]:
    """How many values from `start` on are computed before each node and read at it or later; very many where
    one of them is no tensor."""
    place = {node: i for i, node in enumerate(body)}
    change = [0] * (len(body) + 1)
    for i, node in enumerate(body[start:], start):
        last = max((place.get(user, len(body)) for user in node.users), default=i)
        cost = 1 if isinstance(node.meta.get("val"), Tensor) else len(body)
        change[i + 1] += cost
        change[min(last + 1, len(body))] -= cost
    return [int(total) for total in np.cumsum(change)]


def _plain(gm: GraphModule) -> bool:
    """Whether all inputs are tensors of known sizes, and all else is computed from them."""
    given = gm.graph.find_nodes(op="placeholder")
    held = any(node.op in ("get_attr", "call_module") for node in gm.graph.nodes)
    return not held and all(described(node.meta.get("val")) is not None for node in given)


@dataclass(frozen=True)
class _Piece:
    """nodes of the whole graph, the same as a graph of its own, and what it takes and gives."""

    nodes: list[Node]
    graph: Graph
    inputs: list[Node]
    outputs: list[Node]


def _piece(gm: GraphModule, nodes: list[Node]) -> _Piece:
    inside = set(nodes)
    inputs = dict.fromkeys(given for node in nodes for given in node.all_input_nodes if given not in inside)
    outputs = [node for node in nodes if not inside.issuperset(node.users)]
    graph = Graph()
    copies: dict[Node, Node] = {}
    for source in inputs:
        copies[source] = graph.placeholder(source.name)
        copies[source].meta.update(source.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return _Piece(nodes, graph, list(inputs), outputs)
