"""Freeze batch norm: from a chosen step on, training too normalizes by the running statistics.

In: a graph that trains. Out: the same, where each batch norm with running statistics, that `train_batch_norm`
did not fold into the weight before it, looks at the step counter.

    %z = batch_norm(%y, %gamma, %beta, %mean, %var, False, 0.1, 1e-05, True)
    ->  %z = bitfold.freeze_norm(%y, %gamma, %beta, %mean, %var, 0.1, 1e-05, False, %clock, 900, True)

`settle_frozen_norm` takes it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from ...formats.norm import FREEZE
from ..core import Pass, state
from ..edit import arguments, call
from ..stages import Stage
from .quantizers import clock

aten = torch.ops.aten
FREEZE_NORM = torch.ops.bitfold.freeze_norm.default


@dataclass(frozen=True)
class FreezeNorm(Pass):
    """step: from which running statistics stand still."""

    name: ClassVar[str] = "freeze_norm"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = None
    produces: ClassVar[Stage | None] = None

    step: int = 0

    def apply(self, gm: GraphModule) -> int:
        """Number of batch norms that will."""
        made = 0
        for node in gm.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
            x, gamma, beta, mean, var, training, momentum, eps, cudnn = arguments(node)
            if mean is None or var is None:
                continue  # it has no statistics but its batch's
            counts = clock(gm, x.meta["val"].device)
            args: Any = (x, gamma, beta, mean, var, momentum, eps, training, counts, self.step, cudnn)
            new = call(gm, FREEZE_NORM, args, before=node, origin_from=node)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            made += 1
        state(gm).mutated = None
        return made


@dataclass(frozen=True)
class SettleFrozenNorm(Pass):
    """Has no options. The other way."""

    name: ClassVar[str] = "settle_frozen_norm"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = None
    produces: ClassVar[Stage | None] = None

    def apply(self, gm: GraphModule) -> int:
        """Number of batch norms that are plain again."""
        nodes = gm.graph.find_nodes(op="call_function", target=FREEZE_NORM)
        for node in nodes:
            given = {name: node.args[place] for name, place in FREEZE.items()}
            names = ("x", "gamma", "beta", "mean", "var", "training", "momentum", "eps", "cudnn")
            args: Any = tuple(given[name] for name in names)
            new = call(gm, aten.batch_norm.default, args, before=node, origin_from=node)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
        state(gm).mutated = None
        return len(nodes)
