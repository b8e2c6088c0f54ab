"""What the targets that compile with Inductor share: regions compiled together with the rest of the graph.

In: a lowered graph and fake inputs. Out: a compiled function, or one clear warning and the graph run eagerly.

    CpuTarget().compile(gm, inputs, {"max_autotune": True})  ->  Inductor's C++ (Triton on a GPU)

Inductor's own fusion, memory planning and CUDA graphs do the rest: nothing of them is written again here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..passes import Miss
from .target import Compiled, Target


class InductorTarget(Target):
    """A device that Inductor generates code for."""

    device: ClassVar[str]

    def supports(self, region: GraphModule) -> bool | Miss:
        for node in region.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.device.type != self.device:
                return Miss(
                    f"'{node.name}' is on {value.device}, and the target {self.name} runs on {self.device}"
                )
        return True

    def lower(self, region: GraphModule) -> GraphModule:
        return region

    def missing(self) -> str | None:
        """What this machine lacks for compiling, as the beginning of a sentence, or None."""
        return None

    def compile(self, gm: GraphModule, example_inputs: Sequence[Any], config: Mapping[str, Any]) -> Compiled:
        lacking = self.missing()
        if lacking:
            warnings.warn(
                f"{lacking}, so bitfold runs this graph operator by operator, which is correct and slow",
                stacklevel=2,
            )
            return gm.forward
        from torch._inductor.compile_fx import compile_fx

        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=dict(config) or None)
        return cast(Compiled, compiled)


def dequantized(node: object) -> Node | None:
    """`node` if it decodes a weight, else None."""
    is_one = isinstance(node, Node) and node.target is torch.ops.bitfold.dequantize.default
    return node if is_one else None  # type: ignore[return-value]
