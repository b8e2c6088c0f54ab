"""What the targets that compile with Inductor share: regions compiled together with the rest of the graph.

In: a lowered graph and fake inputs. Out: a compiled function, or one clear warning and the graph run eagerly.

    CpuTarget().compile(gm, inputs, {"max_autotune": True})  ->  Inductor's C++ (Triton on a GPU)

Inductor's own fusion, memory planning and CUDA graphs do the rest: nothing of them is written again here. A
CUDA graph reads weights, codes and caches where they lie, if it is told that they stay there (`STATIC`); all
else it copies before each replay, and what the graph writes to keeps it from being made at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..formats import cache_tag
from ..passes import Miss
from .target import Compiled, Target

STATIC = "bitfold_static"
"""In the `meta` of a placeholder whose tensor has one address in all calls: a parameter, a buffer, codes."""

# Torch's compile caches keep what was compiled with these told.
cache_tag.add("static inputs 1")
# Inductor's cache keeps C++ that is written for the vectors of one process and compiles it for those of
# another: where they are wider, it stores behind the end of its buffers.
cache_tag.add(torch.backends.cpu.get_cpu_capability())


def _inner_compile(gm: GraphModule) -> Any:
    """What compiles the graph's functional form, told which inputs are static. Torch itself reads that off
    Dynamo's own graph only, not off one that passes have rewritten."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    # The graph's own tensors become inputs in front of the others.
    held = len(list(gm.parameters())) + len(list(gm.buffers()))
    static = [*range(held), *(held + i for i, node in enumerate(placeholders) if node.meta.get(STATIC))]
    wanted = held + len(placeholders)

    def compile(functional: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        from torch._inductor import compile_fx

        # Inputs that are one tensor twice are merged, and the places are not these then.
        if options.get("is_inference") and len(inputs) == wanted:
            options["static_input_idxs"] = static
        return compile_fx.compile_fx_inner(functional, inputs, **options)

    return compile


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

    def settings(self) -> dict[str, Any]:
        """Inductor's options that this device wants, where the user's do not say otherwise."""
        return {}

    def compile(self, gm: GraphModule, example_inputs: Sequence[Any], config: Mapping[str, Any]) -> Compiled:
        lacking = self.missing()
        if lacking:
            warnings.warn(
                f"{lacking}, so bitfold runs this graph operator by operator, which is correct and slow",
                stacklevel=2,
            )
            return gm.forward
        return compiled(gm, example_inputs, self.settings() | dict(config))


def compiled(gm: GraphModule, example_inputs: Sequence[Any], config: Mapping[str, Any]) -> Compiled:
    """What Inductor makes of a graph."""
    from torch._inductor.compile_fx import compile_fx

    inner, patches = _inner_compile(gm), dict(config) or None
    made: Any = compile_fx(gm, list(example_inputs), inner_compile=inner, config_patches=patches)
    return cast(Compiled, made)


def dequantized(node: object) -> Node | None:
    """`node` if it decodes a weight, else None."""
    is_one = isinstance(node, Node) and node.target is torch.ops.bitfold.dequantize.default
    return node if is_one else None  # type: ignore[return-value]
