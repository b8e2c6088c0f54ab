"""Train mode: flip what an exported graph has baked in of `model.train()` and `model.eval()`.

Comes in: a captured graph. Goes out: the same graph with the `training` constants of batch norm, dropout and
recurrent layers set, and of the rounding that trains; `gm.train()` and `gm.eval()` of an exported graph
raise, this is what to use instead.

    train_mode{on=true}    dropout(x, 0.1, False)  ->  dropout(x, 0.1, True)

Attention has no such constant: its caller passes a probability of 0 in evaluation. `remember_dropout` takes
the other one from a graph of the same model that was captured in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from ..core import Miss, Pass, report, state
from ..stages import Stage

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
DROPOUT = "bitfold_dropout"
"""In the meta of an attention: its probability of dropout in training."""

# operator -> position of its `training` (or `train`) argument
_TRAINING: dict[Any, int] = {
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.dropout.default: 2,
    aten.dropout_.default: 2,
    aten.feature_dropout.default: 2,
    aten.feature_dropout_.default: 2,
    aten.alpha_dropout.default: 2,
    aten.alpha_dropout_.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.rrelu.default: 3,
    **dict.fromkeys((aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), 6),
    **dict.fromkeys((aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data), 7),
    torch.ops.bitfold.train_quantize.default: 4,
    torch.ops.bitfold.observe_range.default: 3,
    torch.ops.bitfold.fold_norm.default: 7,
    torch.ops.bitfold.unfold_norm.default: 9,
}


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
        at = _TRAINING.get(node.target)
        if at is None or at >= len(node.args) or node.args[at] is self.on:
            return 0
        if node.target in _NORMS and node.args[3] is None:
            # Without running statistics a norm always uses the batch's own.
            return 0
        node.update_arg(at, self.on)
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


_NORMS = (aten.batch_norm.default, aten.instance_norm.default)


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
    return sum(node.target in (aten.dropout.default, aten.dropout_.default) for node in gm.graph.nodes)
