"""What a folded layer is, for those who write checkpoints: one weight, and what its input takes.

In: a folded linear or embedding. Out: its codes in the canonical layout, and the format of its activations.
A layer whose graph does more than that layer (a forward of its own, a quantized output) is refused.

    FoldedLinear, int8 with dynamic int8 activations  ->  FoldedLayer(Quantized(int8, ..), "int8", ())
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...formats import BitfoldError, Quantized, format
from ..folded import Folded

_LAYERS = ("aten.linear.default", "aten.embedding.default")
_AROUND = ("bitfold.dequantize.default", "bitfold.quantize.default", "operator.getitem")


@dataclass(frozen=True)
class FoldedLayer:
    """`input`: the format of the activations, "" for none; `input_params`: its scale and zero point if they
    are static.
    """

    weight: Quantized
    input: str
    input_params: tuple[Tensor, ...]


def folded_layer(module: Folded) -> FoldedLayer:
    """Raises BitfoldError for a module that is more than one linear or embedding on codes."""
    calls = [node for node in module.canonical.graph["nodes"] if node["op"].startswith("call")]
    layers = [node for node in calls if node["target"] in _LAYERS]
    other = sorted({node["target"] for node in calls} - {*_LAYERS, *_AROUND})
    if len(layers) != 1 or other or len(module.folded_weights) != 1 or module.folded_weights[0].back != ():
        what = ", ".join(other) or f"{len(module.folded_weights)} weights"
        raise BitfoldError(
            f"its forward is more than one linear or embedding ({what}), which no such checkpoint can say"
        )
    (weight,) = module.folded_weights
    held = module.quantized(weight)
    layout = format(weight.canonical).layout
    canonical = held.format.relayout(held, layout) if held.format.layout != layout else held
    given, params = _input(module, layers[0], calls)
    return FoldedLayer(canonical, given, params)


def _input(
    module: Folded, layer: dict[str, Any], calls: list[dict[str, Any]]
) -> tuple[str, tuple[Tensor, ...]]:
    quantized = [node for node in calls if node["target"] == "bitfold.quantize.default"]
    if not quantized:
        return "", ()
    (node, *more) = quantized
    decoded = {one["name"] for one in calls if one["target"] == "bitfold.dequantize.default"}
    if more or layer["args"][0]["node"] not in decoded:
        raise BitfoldError("its output is quantized, which no such checkpoint can say")
    static = node["args"][2] if len(node["args"]) > 2 else []
    attributes = {
        one["name"]: one["target"] for one in module.canonical.graph["nodes"] if one["op"] == "get_attr"
    }
    names = [module.canonical.names[attributes[one["node"]]] for one in static]
    return node["args"][1], tuple(getattr(module, name) for name in names)
