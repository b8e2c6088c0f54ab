"""What each layer takes in each format: measured on this machine, or by the roofline model of a GPU.

In: a model, a batch, candidate formats. Out: `Times`: seconds by layer and format, and of all the rest.

    times = measure_times(model, [batch], ("int8", "int4[g32]"))
    times.of("model.layers.0.mlp.down_proj", "int4[g32]")      6.1e-5
    times.total(recipe's choices)                              2.3e-3: the layers and the rest

`measure_times` quantizes a copy of the model in each format and looks at the clock before and after every
layer while the whole model runs, so that each finds the caches as it will find them. `model_times` asks the
formulas of `codegen/cost.py`, for the number of rows that each layer is given.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ...codegen.candidates import candidates
from ...codegen.cost import microseconds
from ...codegen.device import Device, present
from ...codegen.layouts import kernel_layout
from ...codegen.spec import CodegenError, GemmSpec
from ...formats import BitfoldError, format
from ...passes.anchors import TARGETS
from ...passes.note import annotated
from ...passes.observing.batch import Batch
from ..algorithms.at_rest import hooked
from ..algorithms.calibration import Batches
from ..module_scope import Site
from ..quantize import quantize
from .layers import everywhere, planned
from .sensitivity import Choice


@dataclass(frozen=True)
class Times:
    """layers: seconds by (layer, format); rest: of everything else in the model; about: whose they are."""

    layers: dict[tuple[str, str], float]
    rest: float
    about: str

    def of(self, layer: str, fmt: str) -> float:
        """Raises BitfoldError for what is not in the table."""
        found = self.layers.get((layer, str(format(fmt))))
        if found is None:
            raise BitfoldError(f"there is no time of layer {layer!r} in {fmt}; measure it with this format")
        return found

    @property
    def fastest(self) -> float:
        """Seconds of the whole model with each layer in its fastest format."""
        each: dict[str, float] = {}
        for (layer, _), seconds in self.layers.items():
            each[layer] = min(seconds, each.get(layer, math.inf))
        return self.rest + sum(each.values())

    def total(self, chosen: Iterable[Choice]) -> float:
        """Seconds of the whole model."""
        return self.rest + sum(self.of(choice.layer, choice.format) for choice in chosen)


@torch.no_grad()
def measure_times(
    model: nn.Module,
    data: Iterable[Any],
    formats: Sequence[str],
    *,
    repeats: int = 9,
    target: str | None = None,
) -> Times:
    """Times of the model's first batch on the device that it is on; the model is as it was. A layer that this
    batch does not reach takes none. Holds a copy of the model at a time. Raises BitfoldError for no data."""
    batch = _first(data)
    layers: dict[tuple[str, str], float] = {}
    rests = []
    for text in dict.fromkeys(str(format(one)) for one in formats):
        paths = [site.path for site in planned(model, text).sites]
        if not paths:  # a format that fits no layer
            continue
        made = quantize(copy.deepcopy(model), everywhere(text), target=target)
        clock = _Clock({path: made.get_submodule(path) for path in paths})
        totals = clock.run(made, batch, repeats)
        found = {path: statistics.median(seconds or [0.0]) for path, seconds in clock.seconds.items()}
        layers |= {(path, text): seconds for path, seconds in found.items()}
        rests.append(statistics.median(totals) - sum(found.values()))
    return Times(layers, max(statistics.median(rests or [0.0]), 0.0), f"measured, {_sizes(batch)}")


@torch.no_grad()
def model_times(
    model: nn.Module, data: Iterable[Any], formats: Sequence[str], *, card: Device | None = None
) -> Times:
    """Times of the linears by the cost model of a GPU, the present one by default; the rest counts nothing,
    so a budget is of the linears alone."""
    batch, card = _first(data), card or present()
    rows: dict[nn.Module, list[int]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        rows.setdefault(module, []).append(given.numel() // given.shape[-1])

    texts = dict.fromkeys(str(format(one)) for one in formats)
    sites = [(text, site) for text in texts for site in planned(model, text).sites]
    with hooked(model, {site.module: note for _, site in sites}):
        batch.run(model)
    layers = {
        (site.path, text): sum(_modeled(site, text, m, card) for m in rows.get(site.module, []) if m)
        for text, site in sites
    }
    return Times(layers, 0.0, f"linears by the cost model of {card.name}, {_sizes(batch)}")


def _modeled(site: Site, text: str, m: int, card: Device) -> float:
    """Seconds of the site's linears for m rows; 0 if it has none. The faster of two ways counts."""
    total = 0.0
    for node, note in annotated(site.gm):
        operand = node.args[TARGETS[node.target][2]]
        if note.anchor != "linear" or not isinstance(operand, Node):
            continue
        n, k = (int(size) for size in operand.meta["val"].shape)
        total += min(_by_kernel(text, n, k, m, card), _by_library(text, n, k, m, card))
    return total


def _by_kernel(text: str, n: int, k: int, m: int, card: Device) -> float:
    """Seconds of the best schedule; infinity where no kernel decodes the format."""
    laid_out = kernel_layout(format(text), k)
    try:
        spec = None if laid_out is None else GemmSpec(laid_out, n, k)
        schedules = () if spec is None else candidates(spec, m, card)
        return (
            math.inf if spec is None else 1e-6 * min(microseconds(spec, m, schedules, card), default=math.inf)
        )
    except CodegenError:
        return math.inf


def _by_library(text: str, n: int, k: int, m: int, card: Device) -> float:
    """Seconds to decode the weight to bfloat16 and multiply: bytes and products at the card's best rates."""
    codes = format(text).bits_per_element((n, k)) / 8
    decode = n * k * (codes + 2) / card.read
    return decode + max(2 * m * n * k / card.flops, 2 * (n * k + m * k + m * n) / card.read)


class _Clock:
    """Seconds of each of some modules while a model runs."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.paths = {module: path for path, module in modules.items()}
        self.seconds: dict[str, list[float]] = {path: [] for path in modules}
        self.began: dict[nn.Module, float] = {}

    def run(self, model: nn.Module, batch: Batch, repeats: int) -> list[float]:
        """Totals of the repeats, after one that counts nothing. A layer that runs several times in a call
        has the sum of them."""
        totals = []
        here: dict[str, float] = {}

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.began[module] = _now()

        def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            path = self.paths[module]
            here[path] = here.get(path, 0.0) + _now() - self.began[module]

        with hooked(model, dict.fromkeys(self.paths, before), dict.fromkeys(self.paths, after)):
            batch.run(model)
            for _ in range(repeats):
                here.clear()
                began = _now()
                batch.run(model)
                totals.append(_now() - began)
                for path, seconds in here.items():
                    self.seconds[path].append(seconds)
        return totals


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _first(data: Iterable[Any]) -> Batch:
    batch = next(iter(Batches(data, None)), None)
    if batch is None:
        raise BitfoldError("there are no batches to time the layers on; give at least one")
    return batch


def _sizes(batch: Batch) -> str:
    sizes = [list(v.shape) for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
    return f"inputs {', '.join(map(str, sizes))}"
