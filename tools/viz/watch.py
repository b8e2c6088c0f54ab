"""A graph run node by node, its regions too, with every value shown as it comes; if wished a second value
beside it: what the node makes of the unquantized model's values in the place of its own inputs.

In: a graph, a function of (node, value, alone). Out: the graph's result; the function has been called.

    Watched(gm, lambda node, value, alone: print(node, value.shape)).run(x)

`given` names values to feed instead (node -> tensor). A node reads those of its inputs that it names, and of
the others what they made of given values in their turn: a `linear` on a quantized x reads the quantized given
x."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from ..held import cards

Watch = Callable[[Node, Any, Any], None]
"""Called with the node, its value, and the value that it makes alone (None without `given`)."""
Given = Callable[[Node], Tensor | None]


class Watched(Interpreter):
    """`inputs`: what a region's placeholders are given in the second reckoning."""

    def __init__(
        self, gm: GraphModule, watch: Watch, given: Given | None = None, inputs: tuple[Any, ...] | None = None
    ) -> None:
        super().__init__(gm)
        self._watch, self._given, self._inputs = watch, given, inputs
        self._alone: dict[Node, Any] = {}
        self._cards = cards(gm, inputs or ())
        self._place = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}

    def run_node(self, n: Node) -> Any:
        if self._given is None:
            value, alone = super().run_node(n), None
        else:
            value, alone = self._both(n)
            self._alone[n] = alone
        self._watch(n, value, alone)
        return value

    def _both(self, n: Node) -> tuple[Any, Any]:
        region = self._region(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        given = map_arg((n.args, n.kwargs), self._read)
        if region is not None:
            # The region as a whole: given values at its inputs, and its own in between.
            alone = self._aside(region.graph.nodes, lambda: Interpreter(region).run(*given[0]))
            return Watched(region, self._watch, self._given, tuple(given[0])).run(*args), alone
        if n.op == "placeholder" and self._inputs is not None:
            return super().run_node(n), self._inputs[self._place[n]]
        # What writes to a tensor is done once; what reads no given value would come out the same.
        if not n.op.startswith("call_") or writes(n) or _same(args, kwargs, given):
            value = super().run_node(n)
            return value, value
        alone = self._aside([n], lambda: getattr(self, n.op)(n.target, *given))
        return super().run_node(n), alone

    def _aside(self, nodes: Iterable[Node], run: Callable[[], Any]) -> Any:
        """The second reckoning of nodes, in front of the first: it draws the random numbers that the first
        will draw."""
        if not any(draws(node) for node in nodes):
            return run()
        with torch.random.fork_rng(self._cards):
            return run()

    def _read(self, node: Node) -> Any:
        given = None if self._given is None else self._given(node)
        return self._alone[node] if given is None else given

    def _region(self, n: Node) -> GraphModule | None:
        if n.op != "call_module":
            return None
        found = self.module.get_submodule(str(n.target))
        return found if isinstance(found, GraphModule) else None

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        region = self.fetch_attr(target)
        if isinstance(region, GraphModule):
            return Watched(region, self._watch).run(*args)
        return super().call_module(target, args, kwargs)


def writes(node: Node) -> bool:
    """Whether the operator writes to one of its inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def draws(node: Node) -> bool:
    """Whether the operator draws random numbers."""
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )


def _same(args: Any, kwargs: Any, given: Any) -> bool:
    flat, again = torch.utils._pytree.tree_leaves((args, kwargs)), torch.utils._pytree.tree_leaves(given)
    return len(flat) == len(again) and all(a is b for a, b in zip(flat, again, strict=True))
