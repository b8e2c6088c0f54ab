"""Tied weights of one format have one learned scale, as they will have one set of codes.

In: a graph after `train_quantizers`, and what earlier graphs of the same model learn. Out: the same graph;
where it rounds a parameter that was met before, in the same way, its scale is that one's.

    embed.weight int4 lsq  ->  embed.weight_step
    lm_head.weight (the same parameter) int4 lsq  ->  lm_head.weight_step is embed.weight_step
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ..constants import expression
from ..edges import edge
from .quantizers import TRAIN_QUANTIZE


def share_learned(gm: GraphModule, shared: dict[Hashable, nn.Parameter]) -> None:
    """See the file; `shared` is written to."""
    for node in gm.graph.find_nodes(op="call_function", target=TRAIN_QUANTIZE):
        on: Any = edge(node)
        if on.which != "weight" or not node.args[3]:
            continue
        source: Any = node.args[0]
        if source.target is operator.getitem:  # of a batch norm folded into it
            source = source.args[0].args[0]
        chain = expression(gm, source)
        assert chain is not None, f"{node.name} reads no parameter"
        for which, part in enumerate(node.args[3]):
            name = str(part.target)
            key = (id(chain.parameter), chain.text, node.args[1:3], which)
            gm._parameters[name] = shared.setdefault(key, gm.get_parameter(name))
