"""Train mode: flip what an exported graph has baked in of `model.train()` and `model.eval()`.

Comes in: a captured graph. Goes out: the same graph with the `training` constants of batch norm, dropout and
attention dropout set, and of the rounding that trains; `gm.train()` and `gm.eval()` of an exported graph
raise, this is what to use instead.

    train_mode{on=true}    dropout(x, 0.1, False)  ->  dropout(x, 0.1, True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from ..core import Miss, Pass, report, state
from ..stages import Stage

aten = torch.ops.aten

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
        if node.target is aten.scaled_dot_product_attention.default:
            return self._attention(gm, node)
        at = _TRAINING.get(node.target)
        if at is None or at >= len(node.args) or node.args[at] is self.on:
            return 0
        if node.target is aten.batch_norm.default and node.args[3] is None:
            # Without running statistics batch norm always uses the batch's own.
            return 0
        node.update_arg(at, self.on)
        return 1

    def _attention(self, gm: GraphModule, node: Node) -> int:
        """Attention has no such flag: in evaluation its caller passes a probability of 0, its own is lost."""
        probability = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        if self.on or not probability:
            return 0
        report(
            gm,
            node,
            Miss(f"attention keeps its dropout of {probability}; capture the model in eval mode"),
            "eval",
        )
        return 0
