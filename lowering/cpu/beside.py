"""Kernels of one x become one call: queries, keys and values, which nothing else joins.

In: a graph on `bitfold.fused`, its kernels known. Out: the same, with calls of one x as one operator.

    %q = fused([%x, %a, %s], "linear 576x576 ..")[0];  %k = fused([%x, %b, %t], "linear 192x576 ..")[0]
    ->  %r = fused_beside([%x, %a, %s, %b, %t], "linear 576x576 .. & linear 192x576 ..");  %q = %r[0] ..

x is made ready once, and threads are started once. Formats and epilogues may differ: the texts stay what they
were. A call moves to the first one's place, so what it reads must be there, with no write in between.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...codegen import CodegenError
from ...codegen.spec import MOST_WEIGHTS
from ...formats import cache_tag
from ...passes import inherit
from ...passes.edges import epochs
from ..fused import fake, parsed

FUSED = torch.ops.bitfold.fused.default
BESIDE = torch.ops.bitfold.fused_beside.default
BETWEEN = " & "  # as headers/runtime.cpp has it


def beside(gm: GraphModule) -> int:
    """Number of calls that became part of another."""
    since, place = epochs(gm), {node: i for i, node in enumerate(gm.graph.nodes)}
    groups: dict[tuple[object, ...], list[list[Node]]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=FUSED):
        groups_of_x = groups.setdefault((*_of_x(node), since[node]), [])
        open_ = [g for g in groups_of_x if len(g) < MOST_WEIGHTS and _there(node, g[0], place)]
        if open_:
            open_[0].append(node)
        else:
            groups_of_x.append([node])
    found = 0
    for calls in (group for of_x in groups.values() for group in of_x if len(group) > 1):
        _join(gm, calls)
        found += len(calls) - 1
    return found


def _of_x(call: Node) -> list[Any]:
    """x, and its scales if it comes in codes."""
    inputs: Any = call.args[0]
    return list(inputs[: 1 + (parsed(str(call.args[1])).activation is not None)])


def _there(call: Node, first: Node, place: dict[Node, int]) -> bool:
    """Whether all that `call` reads is there before `first`; only its results are looked up in it."""
    results = all(user.target is operator.getitem for user in call.users)
    return results and all(place[given] < place[first] for given in call.all_input_nodes)


def _join(gm: GraphModule, calls: Sequence[Node]) -> None:
    shared = len(_of_x(calls[0]))
    inputs: list[Any] = [*_of_x(calls[0])]
    for call in calls:
        inputs += list(call.args[0])[shared:]  # type: ignore[arg-type]
    with gm.graph.inserting_before(calls[0]):
        joined = gm.graph.call_function(BESIDE, (inputs, BETWEEN.join(str(call.args[1]) for call in calls)))
        results = [gm.graph.call_function(operator.getitem, (joined, i)) for i in range(len(calls))]
    joined.meta["val"] = [call.meta["val"][0] for call in calls]
    inherit(joined, list(calls))
    for call, result in zip(calls, results, strict=True):
        result.meta["val"] = call.meta["val"][0]
        inherit(result, [call])
        for user in list(call.users):
            user.replace_all_uses_with(result)
            gm.graph.erase_node(user)
        gm.graph.erase_node(call)


def apart(inputs: Sequence[Tensor], texts: str) -> list[tuple[list[Tensor], str]]:
    """The calls that the operator stands for."""
    found, rest = [], list(inputs)
    first = 1 + (parsed(texts.split(BETWEEN)[0]).activation is not None)
    of_x, rest = rest[:first], rest[first:]
    for text in texts.split(BETWEEN):
        count = parsed(text).arity - first
        found.append(([*of_x, *rest[:count]], text))
        rest = rest[count:]
    if rest:
        raise CodegenError(f"{texts} takes {len(inputs) - len(rest)} tensors, not {len(inputs)}")
    return found


def beside_fake(inputs: Sequence[Tensor], texts: str) -> list[Tensor]:
    """Shapes only."""
    return [fake(given, text)[0] for given, text in apart(inputs, texts)]


def build_for_cpu(inputs: Sequence[Tensor], texts: str) -> list[Tensor]:
    """The first call of a process: builds the operator in C++, which takes its own place."""
    device = inputs[0].device.type if inputs else "no device"
    if device != "cpu":
        raise CodegenError(f"bitfold.fused_beside runs on CPUs, not on {device}")
    from ...codegen.cpp.build import know

    know([parsed(text) for text in texts.split(BETWEEN)])
    found: list[Tensor] = torch.ops.bitfold.fused_beside(list(inputs), texts)
    return found


# Torch's compile caches know the operator by name only.
cache_tag.add("fused_beside 1")
