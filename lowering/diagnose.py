"""Which layer loses the quality: every quantized layer held against the float model on the same data.

In: the float model, its quantized twin, batches. Out: a `Diagnosis`, which prints the worst layers first.

    print(bf.diagnose(model, quantized, batches))
    layer                       format      isolated  cumulative  alone
    model.layers.0.mlp.down     int4[g64]    18.2 dB     17.9 dB  31.4 dB
    ...

Three signal-to-noise ratios (`signal_to_noise.py`), over all batches together:

- isolated: the layer's output, given what goes into it in the float model: its own rounding
- cumulative: the layer's output in the quantized model: its own rounding and all before it
- alone: the model's output when this layer is the only one that is quantized: what its rounding does to the
  end

`tools/explain` has the first two of a graph's nodes on one input, and the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import BitfoldError
from ..passes.core import Progress
from ..passes.observing.batch import Batch
from .algorithms.at_rest import at_rest, hooked
from .algorithms.calibration import Batches
from .folded import Folded
from .given_model import is_graph, module_of
from .outputs import first_output, float_output, numbers
from .signal_to_noise import Ratio

NO_NUMBER = "no number"
"""Said of a ratio where the quantized layer, or model, gives NaN or infinity."""


@dataclass(frozen=True)
class LayerLoss:
    """One folded layer. Ratios in dB; infinite where nothing differs; NaN for `alone` if it was not asked
    for, for `cumulative` where a router sent the layer other tokens than in the float model, and for all
    three where no batch has `reached` the layer."""

    path: str
    format: str
    isolated: float
    cumulative: float
    alone: float = math.nan
    reached: bool = True

    @property
    def by_itself(self) -> str:
        """`isolated` as a table has it."""
        return (decibel(self.isolated) or NO_NUMBER) if self.reached else "not reached"


@dataclass(frozen=True)
class Diagnosis:
    """Every layer, in the model's order; `output`: the ratio at the end of the whole quantized model."""

    layers: tuple[LayerLoss, ...]
    output: float

    def worst(self, count: int | None = None) -> tuple[LayerLoss, ...]:
        """Layers by what they do to the model's output, or else by their own rounding; the worst first."""
        return tuple(sorted(self.layers, key=_rank)[:count])

    def __str__(self) -> str:
        head = ("layer", "format", "isolated", "cumulative", "alone")
        rows = [
            (one.path, one.format, one.by_itself, decibel(one.cumulative), decibel(one.alone))
            for one in self.worst()
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        return "\n".join([*lines, f"the model's output: {decibel(self.output) or NO_NUMBER}"])


def _rank(layer: LayerLoss) -> tuple[bool, float]:
    """The worst layer first: one that gives no numbers. Of one that was not reached nothing is known."""
    value = layer.isolated if math.isnan(layer.alone) else layer.alone
    return not layer.reached, -math.inf if math.isnan(value) else value


@dataclass
class _Layer:
    path: str
    folded: Folded
    module: nn.Module
    isolated: Ratio = field(default_factory=Ratio)
    cumulative: Ratio = field(default_factory=Ratio)
    alone: Ratio = field(default_factory=Ratio)


@torch.no_grad()
def diagnose(
    model: nn.Module,
    quantized: nn.Module,
    batches: Iterable[Any],
    *,
    alone: bool = True,
    progress: Progress | None = None,
) -> Diagnosis:
    """Compare the folded layers of `quantized` with the layers of `model` at the same paths.

    `alone` runs the float model once more for each layer and batch. Both models are left as they were. Raises
    BitfoldError for models that do not belong together and for data that they do not take.
    """
    model, quantized = module_of(model, "bf.diagnose"), module_of(quantized, "bf.diagnose")
    layers = _paired(model, quantized)
    output, count = Ratio(), 0
    with at_rest(model), at_rest(quantized):
        for batch in Batches(batches, None):
            count += 1
            if progress is not None:
                progress(f"batch {count}", count, 0)
            end = _compare(model, quantized, layers, batch, output)
            for done, layer in enumerate(layers if alone else ()):
                if progress is not None:
                    progress(f"{layer.path} alone", done, len(layers))
                with replaced(model, layer.module, layer.folded):
                    layer.alone.add(end, first_output(model, batch))
    if not count:
        raise BitfoldError("there are no batches to compare the models on; give at least one")
    found = [
        LayerLoss(
            layer.path,
            ", ".join(weight.canonical for weight in layer.folded.folded_weights),
            layer.isolated.db,
            layer.cumulative.db,
            layer.alone.db if alone and layer.isolated.compared else math.nan,
            layer.isolated.compared,
        )
        for layer in layers
    ]
    return Diagnosis(tuple(found), output.db)


@contextmanager
def replaced(model: nn.Module, module: nn.Module, by: nn.Module) -> Iterator[None]:
    """The model with another module in the place of one: under each of its names, and where it is called by
    none of them (out of a plain list)."""
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is module
    ]
    own = {name: value for name, value in vars(module).items() if name == "forward"}
    try:
        for parent, name in places:
            parent._modules[name] = by
        vars(module)["forward"] = by.forward
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(own)
        for parent, name in places:
            parent._modules[name] = module


def decibel(value: float) -> str:
    """As a table has it."""
    if math.isnan(value):
        return ""
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _paired(model: nn.Module, quantized: nn.Module) -> list[_Layer]:
    known = dict(model.named_modules())
    found = []
    for path, module in quantized.named_modules():
        if not isinstance(module, Folded):
            continue
        if path not in known or isinstance(known[path], Folded):
            why = "has none at that path" if path not in known else "is quantized there too"
            raise BitfoldError(
                f"layer {path!r} of the quantized model has no float twin: the other model {why}; give "
                "the model as it was before bf.quantize (copy.deepcopy keeps one)"
            )
        if path:
            found.append(_Layer(path, module, known[path]))
    if not found and isinstance(quantized, Folded):
        raise BitfoldError(
            f"this {type(quantized).__name__} is one layer and no model with layers in it; put both into an "
            "nn.Sequential"
        )
    if not found and any(isinstance(module, Folded) for module in known.values()):
        raise BitfoldError(
            "the first of the two models is quantized and the second is not; give the float model first"
        )
    if not found and is_graph(quantized):
        raise BitfoldError(
            "bf.diagnose compares modules, and a program's layers are operators; `bitfold explain` compares "
            "those"
        )
    if not found:
        name = type(quantized).__name__
        raise BitfoldError(f"no layer of this {name} is quantized; call bf.quantize first")
    return found


def _compare(
    model: nn.Module, quantized: nn.Module, layers: list[_Layer], batch: Batch, output: Ratio
) -> Tensor:
    """One batch through both models; the float model's output."""
    kept: dict[str, list[list[Tensor]]] = {layer.path: [] for layer in layers}

    def keep(layer: _Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            exact = numbers(result)
            layer.isolated.compare(exact, numbers(layer.folded.forward(*args, **kwargs)))
            # A copy: what comes next may write to it (ReLU(inplace=True)).
            kept[layer.path].append([one.clone() for one in exact])

        return hook

    def against(layer: _Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if kept[layer.path]:
                layer.cumulative.compare(kept[layer.path].pop(0), numbers(result))

        return hook

    with hooked(model, {}, {layer.module: keep(layer) for layer in layers}):
        end = float_output(model, batch)
    with hooked(quantized, {}, {layer.folded: against(layer) for layer in layers}):
        result = first_output(quantized, batch)
    if end.shape != result.shape:
        raise BitfoldError(
            f"the models do not belong together: one returns {list(end.shape)} where the quantized one "
            f"returns {list(result.shape)}; give the model as it was before bf.quantize"
        )
    output.add(end, result)
    return end
