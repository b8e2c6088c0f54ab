"""Train mode: flip what an exported graph has baked in of `model.train()` and `model.eval()`.

Comes in: a captured graph. Goes out: the same graph with the `training` constants of batch norm, dropout and
recurrent layers set, and of the rounding that trains; `gm.train()` and `gm.eval()` of an exported graph
raise, this is what to use instead.

    train_mode{on=true}    dropout(x, 0.1, False)  ->  dropout(x, 0.1, True)

Attention has no such constant: its caller passes a probability of 0 in evaluation. `remember_dropout` takes
the other one from a graph of the same model that was captured in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from ..core import Miss, Pass, report, state
from ..edit import arguments
from ..stages import Stage

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
DROPOUT = "bitfold_dropout"
"""In the meta of an attention: its probability of dropout in training."""

# What operators call the argument that says so.
_NAMES = ("train", "training", "use_input_stats")
_NORMS = (aten.batch_norm.default, aten.instance_norm.default)


@dataclass(frozen=True)
class TrainMode(Pass):
    """Set the graph to training (`on=true`) or evaluation."""

    name: ClassVar[str] = "train_mode"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = None
    produces: ClassVar[Stage | None] = None

    on: bool = True

    def apply(self, gm: GraphModule) -> int:
        rewrites = 0
        for node in gm.graph.nodes:
            rewrites += self._flip(gm, node)
        # In training batch norm writes its running statistics, so what is constant has to be looked up again.
        state(gm).mutated = None
        return rewrites

    def _flip(self, gm: GraphModule, node: Node) -> int:
        if node.target is ATTENTION:
            return self._attention(gm, node)
        at = _told(node)
        if at is None:
            return 0
        args = arguments(node)
        if args[at] is self.on:
            return 0
        # torch.export leaves out what has its default value.
        schema: Any = node.target._schema  # type: ignore[union-attr]
        placed = {argument.name for argument in schema.arguments[: at + 1]}
        node.args = (*args[:at], self.on, *node.args[at + 1 :])
        node.kwargs = {name: value for name, value in node.kwargs.items() if name not in placed}
        return 1

    def _attention(self, gm: GraphModule, node: Node) -> int:
        before, known = probability(node), node.meta.get(DROPOUT)
        if known is None:
            if before and not self.on:
                why = f"attention keeps its dropout of {before}; capture the model in eval mode"
                report(gm, node, Miss(why), "eval")
            return 0
        wanted = known if self.on else 0.0
        if wanted == before:
            return 0
        if len(node.args) > 4:
            node.update_arg(4, wanted)
        else:
            node.update_kwarg("dropout_p", wanted)
        return 1


def trains(node: Node) -> bool:
    """Whether an operator is told that it is in training."""
    at = _told(node)
    return at is not None and arguments(node)[at] is True


@contextmanager
def evaluating(gm: GraphModule) -> Iterator[None]:
    """The graph in evaluation meanwhile; then what trained does so again, and what did not still does not."""
    on, off = TrainMode(on=True), TrainMode(on=False)
    dropping = [node for node in gm.graph.nodes if node.target is ATTENTION and probability(node)]
    fresh = [node for node in dropping if DROPOUT not in node.meta]
    for node in fresh:
        node.meta[DROPOUT] = probability(node)
    trained = [*dropping, *(node for node in gm.graph.nodes if trains(node))]
    for node in trained:
        off._flip(gm, node)
    state(gm).mutated = None
    gm.recompile()
    try:
        yield
    finally:
        for node in trained:
            on._flip(gm, node)
        for node in fresh:
            del node.meta[DROPOUT]
        state(gm).mutated = None
        gm.recompile()


def _told(node: Node) -> int | None:
    """Which argument of an operator tells it that it is in training; None if none does."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target in _NORMS and node.args[3] is None:
        return None  # without running statistics a norm always uses the batch's own
    names = [argument.name for argument in node.target._schema.arguments]
    return next((at for at, name in enumerate(names) if name in _NAMES), None)


def probability(node: Node) -> float:
    """The probability of dropout that an attention is called with."""
    found: Any = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return float(found)


def remember_dropout(gm: GraphModule, trained: GraphModule) -> int:
    """Tell each attention of a graph that was captured in evaluation its dropout in `trained`, the same model
    captured in training; to how many. Attentions are told apart by their order. What cannot be told, and
    dropout that only the other graph has, is reported."""
    here = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    there = trained.graph.find_nodes(op="call_function", target=ATTENTION)
    sizes = [[str(node.args[0].meta["val"].shape) for node in nodes] for nodes in (here, there)]
    alike = sizes[0] == sizes[1]
    if not alike:
        without_dropout(gm, f"in training the model calls {len(there)} attentions, not these {len(here)}")
    lost = _dropouts(trained) - _dropouts(gm)
    if lost > 0:
        without_dropout(gm, f"in training the model calls dropout {lost} times more than in evaluation")
    for node, other in zip(here, there, strict=True) if alike else ():
        node.meta[DROPOUT] = probability(other)
    return len(here) if alike else 0


def without_dropout(gm: GraphModule, why: str) -> None:
    """Report that a graph trains without some dropout that its model has."""
    report(gm, gm.graph.output_node(), Miss(f"{why}; this graph trains without that dropout"), "train")


def _dropouts(gm: GraphModule) -> int:
    return sum(_told(node) is not None and "dropout" in str(node.target) for node in gm.graph.nodes)
