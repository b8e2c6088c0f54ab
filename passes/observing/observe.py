"""Observe: put observers on the activations whose range a recipe wants calibrated.

In: an annotated graph. Out: the same graph with an observer, a small module that returns its input and
remembers the range, on each such edge; layers that read the same activation in the same format share one.

    %y = aten.linear(%x, %w)  # int8[tensor] input, observed by minmax
    ->  %fc_input_observer = call_module[fc_input_observer](%x); %y = aten.linear(%fc_input_observer, %w)

`calibrate(gm, batches)` then runs data through; `fake_quantize` or `fold` turns each observer into scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from ..core import Pass
from ..edges import Edge, split_activations
from ..edit import free_name
from ..provenance import inherit
from ..stages import Stage
from .kinds import observer


@dataclass(frozen=True)
class Observe(Pass):
    """Has no options: the recipe's rules say which edges are calibrated, and by which observer."""

    name: ClassVar[str] = "observe"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.annotated,)
    produces: ClassVar[Stage | None] = Stage.observed

    def apply(self, gm: GraphModule) -> int:
        """Number of observers inserted."""

        def make(on: Edge, value: Node, before: Node) -> Node:
            name = free_name(gm, f"{on.layer}_{on.which}_observer")
            made = observer(on.observer)
            made.at = f"the {on.which} of layer {on.layer}"
            gm.add_submodule(name, made)
            with gm.graph.inserting_before(before):
                node = gm.graph.create_node("call_module", name, (value,), {}, name=name)
            node.meta["val"] = value.meta["val"]
            return inherit(node, [before if on.which == "input" else value])

        return split_activations(gm, make, observed_only=True)
