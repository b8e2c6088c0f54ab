"""Patterns: rewrites written as two small functions on torch ops, and the matcher that applies them.

Comes in: a graph and patterns. Goes out: the graph with every match replaced, and how many there were.

    SILU = Pattern("silu", lambda x: x * torch.sigmoid(x), F.silu, (torch.empty(2, 3),))
    rewrite(gm, [SILU])      s = sigmoid(h);  m = mul(h, s)   ->   m = silu(h)

The two functions are traced once, on the example inputs, to the operators that a capture holds. A tensor
input matches any node; a number input matches any number (give an example value that appears nowhere else in
the function); every other number has to be equal. Addition and multiplication match in either order. `where`
sees the match and may refuse it with a `Miss`, which is reported.

A pattern is tried only at nodes that call its last operator, and looks back as many nodes as it has: the
cost is linear in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ..formats.errors import BitfoldError
from .core import Miss, report
from .edit import arguments, call

aten = torch.ops.aten

_COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor})


@dataclass(frozen=True)
class Match:
    """A place where a pattern fits: the graph's nodes, first to last, and what each input is bound to."""

    gm: GraphModule
    nodes: tuple[Node, ...]
    inputs: tuple[Any, ...]

    @property
    def root(self) -> Node:
        """The last node, whose value the replacement takes over."""
        return self.nodes[-1]


@dataclass(frozen=True, eq=False)
class Pattern:
    """`pattern` and `replacement` take the same inputs, tensors or numbers, and return one tensor."""

    name: str
    pattern: Callable[..., Tensor]
    replacement: Callable[..., Tensor]
    examples: tuple[Any, ...]
    where: Callable[[Match], Miss | None] | None = None

    def __post_init__(self) -> None:
        if not any(isinstance(example, Tensor) for example in self.examples):
            raise BitfoldError(f"the pattern '{self.name}' needs a tensor among its example inputs")
        root = _traced(self, self.pattern).root
        if not isinstance(root, Node) or root.op != "call_function":
            raise BitfoldError(f"the pattern '{self.name}' has to compute one tensor from its inputs")


@dataclass(frozen=True)
class _Traced:
    """A pattern's function as a graph: its steps, its result, and which input each placeholder stands for."""

    steps: tuple[Node, ...]
    root: Any
    inputs: dict[Node, int]
    numbers: dict[Any, int]


@lru_cache(maxsize=512)
def _traced(pattern: Pattern, function: Callable[..., Tensor]) -> _Traced:
    mode = FakeTensorMode()
    tensors = [index for index, example in enumerate(pattern.examples) if isinstance(example, Tensor)]
    fakes = [mode.from_tensor(pattern.examples[index]) for index in tensors]

    def run(*given: Tensor) -> Tensor:
        inputs = list(pattern.examples)
        for index, value in zip(tensors, given, strict=True):
            inputs[index] = value
        return function(*inputs)

    with mode:
        graph = make_fx(run, pre_dispatch=True, tracing_mode="real")(*fakes).graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return _Traced(
        steps=tuple(node for node in graph.nodes if node.op == "call_function"),
        root=graph.output_node().args[0],
        inputs=dict(zip(placeholders, tensors, strict=True)),
        numbers={
            example: index
            for index, example in enumerate(pattern.examples)
            if not isinstance(example, Tensor)
        },
    )


def rewrite(gm: GraphModule, patterns: Iterable[Pattern]) -> int:
    """Replace every match of every pattern, the first pattern first; return how many."""
    rewrites = 0
    for pattern in patterns:
        root = _traced(pattern, pattern.pattern).root
        for node in list(gm.graph.find_nodes(op="call_function", target=root.target)):
            # An earlier replacement may have swallowed this node.
            if node._erased:
                continue
            match = find(gm, node, pattern)
            if isinstance(match, Match):
                _replace(pattern, match)
                rewrites += 1
            elif match is not None:
                report(gm, node, match, asked=pattern.name)
    return rewrites


def find(gm: GraphModule, node: Node, pattern: Pattern) -> Match | Miss | None:
    """The match that ends at `node`; None if the shape is another; a Miss if something else forbids it."""
    traced = _traced(pattern, pattern.pattern)
    bound = _bind(traced, traced.root, node, {})
    if bound is None:
        return None
    nodes = tuple(bound[step] for step in traced.steps)
    inside = set(nodes)
    for inner in nodes[:-1]:
        outside = next((user for user in inner.users if user not in inside), None)
        if outside is not None:
            return Miss(f"its intermediate result '{inner.name}' is used by '{outside.name}', too")
    inputs = [bound.get(("number", index)) for index in range(len(pattern.examples))]
    for placeholder, index in traced.inputs.items():
        inputs[index] = bound.get(placeholder)
    match = Match(gm, nodes, tuple(inputs))
    refused = pattern.where(match) if pattern.where is not None else None
    return match if refused is None else refused


Bound = dict[Any, Any]


def _bind(traced: _Traced, want: Any, have: Any, bound: Bound) -> Bound | None:
    """`bound` with what makes `want` of the pattern equal `have` of the graph; None if nothing does."""
    if isinstance(want, Node):
        if want in bound:
            return bound if bound[want] is have else None
        if want in traced.inputs:
            return {**bound, want: have} if isinstance(have, Node) else None
        return _bind_call(traced, want, have, bound)
    if isinstance(want, (list, tuple)):
        if not isinstance(have, (list, tuple)) or len(want) != len(have):
            return None
        return _bind_all(traced, want, have, bound)
    if not isinstance(want, bool) and isinstance(want, (int, float)) and want in traced.numbers:
        key = ("number", traced.numbers[want])
        if isinstance(have, Node) or bound.get(key, have) != have:
            return None
        return {**bound, key: have}
    return bound if not isinstance(have, Node) and want == have else None


def _bind_call(traced: _Traced, want: Node, have: Any, bound: Bound) -> Bound | None:
    if not isinstance(have, Node) or have.op != "call_function" or have.target is not want.target:
        return None
    wanted, given = arguments(want), arguments(have)
    found = _bind_all(traced, wanted, given, {**bound, want: have})
    if found is None and want.target in _COMMUTATIVE:
        found = _bind_all(traced, wanted, [given[1], given[0], *given[2:]], {**bound, want: have})
    return found


def _bind_all(traced: _Traced, wanted: Iterable[Any], given: Iterable[Any], bound: Bound) -> Bound | None:
    found: Bound | None = bound
    for want, have in zip(wanted, given, strict=True):
        if found is None:
            return None
        found = _bind(traced, want, have, found)
    return found


def _replace(pattern: Pattern, match: Match) -> None:
    traced = _traced(pattern, pattern.replacement)
    values: dict[Node, Any] = {node: match.inputs[index] for node, index in traced.inputs.items()}

    def value(argument: Any) -> Any:
        if (
            isinstance(argument, float | int)
            and not isinstance(argument, bool)
            and argument in traced.numbers
        ):
            return match.inputs[traced.numbers[argument]]
        return argument

    for step in traced.steps:
        args = tuple(value(argument) for argument in map_arg(step.args, values.__getitem__))
        kwargs = {key: value(argument) for key, argument in map_arg(step.kwargs, values.__getitem__).items()}
        assert callable(step.target)
        values[step] = call(match.gm, step.target, args, kwargs, before=match.root, origin_from=match.nodes)
    match.root.replace_all_uses_with(values[traced.root])
    for node in reversed(match.nodes):
        match.gm.graph.erase_node(node)
