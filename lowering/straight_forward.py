"""The forward of a folded module, spelled out for its body: what Dynamo traces in one frame.

In: a body that needs no `self`, and what its leading inputs are called in the module. Out: a class whose
forward is that body.

    body(codes, scales, x) = fused([x, codes, scales], "..")[0]
    ->  class FoldedLinear(FoldedLinear):
            def forward(self, input):
                return t0([input, self.codes, self.scales], "..")[0]

`Folded.forward` looks its operands and its body up by names that it holds, and each look-up is a guard of
each module. Here they are the class's own, which Dynamo guards once for all modules that are alike.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from keyword import iskeyword
from math import isfinite
from typing import Any

from torch.fx import Graph, Node

_OF = "straight_forward_of"
"""In a class that was made here: the class that it was made of."""


def plain_class(cls: type) -> type:
    """The class without a forward that was spelled out."""
    found: type = vars(cls).get(_OF, cls)
    return found


def straight_class(
    cls: type, graph: Graph | None, operands: Sequence[str], generic: Callable[..., Any]
) -> type:
    """A class like `cls` whose forward is the graph; with `generic` as its forward, where that cannot be or
    there is none."""
    of = plain_class(cls)
    code = _code(graph, operands) if graph is not None else None
    if code is not None:
        return _made(of, *code)
    stale = any(_OF in vars(base) for base in of.__mro__)  # whoever made a class of ours is between
    return _with(of, generic) if stale else of


def _code(graph: Graph, operands: Sequence[str]) -> tuple[str, tuple[Any, ...]] | None:
    """The text of the forward, and what its names t0, t1, .. stand for."""
    inputs = list(graph.find_nodes(op="placeholder"))
    if len(inputs) != len(operands) + 1 or not all(n.isidentifier() and not iskeyword(n) for n in operands):
        return None
    told = [f"self.{name}" for name in operands] + ["input"]
    spelled = _Spelled(dict(zip(inputs, told, strict=True)))
    lines: list[str] = []
    for node in graph.nodes:
        if node.op == "call_function":
            text = spelled.call(node)
            if not _picked(node):
                lines.append(f"v{len(lines)} = {text}")
                text = f"v{len(lines) - 1}"
            spelled.names[node] = text
        elif node.op == "output":
            lines.append(f"return {spelled.value(node.args[0])}")
    try:
        hash(tuple(spelled.others))
    except TypeError:
        return None
    return "def forward(self, input):\n    " + "\n    ".join(lines) + "\n", tuple(spelled.others)


def _picked(node: Node) -> bool:
    """Whether all that becomes of a value, next, is that one of its members is taken or it is returned."""
    ends = node.next.target is operator.getitem or (node.next.op == "output" and node.next.args[0] is node)
    return list(node.users) == [node.next] and ends


class _Spelled:
    """Values of a graph as Python's text. others: what has none, by number."""

    def __init__(self, names: dict[Node, str]) -> None:
        self.names = names
        self.others: list[Any] = []

    def call(self, node: Node) -> str:
        if node.target is operator.getitem and isinstance(node.args[1], int):
            return f"{self.value(node.args[0])}[{node.args[1]}]"
        given = [self.value(one) for one in node.args]
        given += [f"{name}={self.value(one)}" for name, one in node.kwargs.items()]
        return f"{self.other(node.target)}({', '.join(given)})"

    def value(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.names[value]
        if value is None or type(value) in (bool, int, str) or (type(value) is float and isfinite(value)):
            return repr(value)
        if isinstance(value, tuple):
            return f"({''.join(f'{self.value(one)}, ' for one in value)})"
        if isinstance(value, list):
            return f"[{', '.join(self.value(one) for one in value)}]"
        if isinstance(value, Mapping):
            return f"{{{', '.join(f'{key!r}: {self.value(one)}' for key, one in value.items())}}}"
        return self.other(value)

    def other(self, value: Any) -> str:
        place = next((i for i, one in enumerate(self.others) if one is value), len(self.others))
        if place == len(self.others):
            self.others.append(value)
        return f"t{place}"


@lru_cache(maxsize=1024)
def _made(of: type, text: str, others: tuple[Any, ...]) -> type:
    names: dict[str, Any] = {f"t{i}": one for i, one in enumerate(others)}
    exec(compile(text, f"<forward of a folded {of.__name__}>", "exec"), names)
    return _with(of, names["forward"])


@lru_cache(maxsize=1024)
def _with(of: type, forward: Callable[..., Any]) -> type:
    about = {"__module__": of.__module__, "__qualname__": of.__qualname__, "__doc__": of.__doc__}
    return type(of.__name__, (of,), {**about, "forward": forward, _OF: of})
