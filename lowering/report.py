"""What became of a quantized model: its folded layers with their bytes, and what a recipe asked for in vain.

In: a model after `bf.quantize` or `bf.load`, or a graph. Out: a `Report`, which prints as a table.

    print(bf.report(model))
    layer                           format      was        is
    model.layers.0.mlp.up_proj      int4[g128]  3.4 MiB    0.5 MiB
    ...
    asked for and not given:
      model.layers.0.mlp.gate: int4[g128]: ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule

from ..formats import BitfoldError
from ..passes import MissRecord, state
from ..passes.stages import find_attribute
from .folded import Folded
from .folded_weight import Canonical
from .given_model import is_graph, module_of
from .install import CANONICAL, Parts, canonical_parts, decoded_dtypes, weight_parts

ATTRIBUTE = "bitfold_misses"
"""On the quantized model: what was asked for and not given."""


@dataclass(frozen=True)
class Layer:
    """One folded weight. `bytes_before`: in the dtype that it is decoded to. A tied weight counts once."""

    path: str
    format: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    tied_to: str = ""


@dataclass(frozen=True)
class Report:
    """All folded weights in the model's order, all misses, and the bytes of what stayed as it was."""

    layers: tuple[Layer, ...]
    misses: tuple[MissRecord, ...]
    other_bytes: int

    @property
    def bytes_before(self) -> int:
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        rows = [(layer.path, layer.format, _size(layer.bytes_before), _after(layer)) for layer in self.layers]
        rows.append(("everything else", "as it was", _size(self.other_bytes), _size(self.other_bytes)))
        rows.append(("total", "", _size(self.bytes_before), _size(self.bytes_after)))
        head = ("layer", "format", "was", "is")
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in (head, *rows)
        ]
        if self.misses:
            lines += ["", "asked for and not given:", *(f"  {miss}" for miss in self.misses)]
        return "\n".join(line.rstrip() for line in lines)


def report(model: nn.Module) -> Report:
    """What is folded in `model` and what was not. Raises BitfoldError if bitfold never touched the model."""
    model = module_of(model, "bf.report")
    if is_graph(model):
        return _of_graph(model)
    folded = [(path, module) for path, module in model.named_modules() if isinstance(module, Folded)]
    misses = tuple(miss for module in model.modules() for miss in module.__dict__.get(ATTRIBUTE, ()))
    if not folded and not any(ATTRIBUTE in module.__dict__ for module in model.modules()):
        raise BitfoldError(
            f"nothing in this {type(model).__name__} is folded; call bf.quantize(model, recipe) first"
        )
    seen: dict[int, str] = {}
    layers: list[Layer] = []
    for path, module in folded:
        for weight in module.folded_weights:
            name = path if weight.name == "weight" else ".".join(part for part in (path, weight.name) if part)
            parts = [getattr(module, part) for part in weight.parts]
            tied = seen.setdefault(id(parts[0]), name)
            before = math.prod(weight.shape) * module.compute_dtype.itemsize
            after = sum(part.nbytes for part in parts)
            once = tied == name
            layers.append(
                Layer(
                    name or "(the model)",
                    weight.canonical,
                    weight.shape,
                    before * once,
                    after * once,
                    "" if once else tied,
                )
            )
    parts_of = {id(getattr(module, part)) for _, module in folded for part in module.parts}
    rest = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in parts_of]
    return Report(tuple(layers), misses, sum(tensor.nbytes for tensor in rest))


def _of_graph(gm: GraphModule) -> Report:
    layers: list[Layer] = []
    counted: set[str] = set()
    files = _canonical(gm)
    for attributes, text, k in weight_parts(gm):
        parts = [find_attribute(gm, name) for name in attributes]
        counted.update(attributes)
        shape = (*parts[0].shape[:-1], k)
        canonical, dtype = files.get(attributes, (text, torch.float32))
        before, after = math.prod(shape) * dtype.itemsize, sum(part.nbytes for part in parts)
        layers.append(Layer(attributes[0].removesuffix("_codes"), canonical, shape, before, after))
    held = [*gm.named_parameters(), *gm.named_buffers()]
    rest = sum(tensor.nbytes for name, tensor in held if name not in counted)
    return Report(tuple(layers), tuple(state(gm).misses), rest)


def _canonical(gm: GraphModule) -> dict[Parts, tuple[str, torch.dtype]]:
    """Format and dtype of each weight before a target laid it out; nothing of a graph that does not say."""
    canonical = gm.meta.get(CANONICAL)
    if not isinstance(canonical, Canonical):
        return {}
    dtypes = decoded_dtypes(canonical.graph)
    return {parts: (text, dtypes[parts]) for parts, text, _ in canonical_parts(canonical.graph)}


def _after(layer: Layer) -> str:
    return f"tied to {layer.tied_to}" if layer.tied_to else _size(layer.bytes_after)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
