"""Data for `bf.quantize`: batches checked as they come, and run through the model beside observers.

In: batches as a user gives them (a tensor, a tuple of arguments, a dict of keywords). Out: ranges in the
observers of each module's graph, or the arguments that a module gets. The model is only run, in eval mode
and without gradients, and is then as it was.

    for batch in Batches(loader, None): model(*batch.args, **batch.kwargs)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ...formats import BitfoldError
from ...passes.core import Progress
from ...passes.observing.batch import Batch, as_batch
from ...passes.observing.calibrate import named
from .at_rest import hooked, in_order

_END = object()


class Batches:
    """Calibration data and example inputs; read once, so that a generator will do."""

    def __init__(self, calibration: Iterable[Any] | None, example: Any) -> None:
        if isinstance(calibration, Tensor | Mapping | str) or (
            calibration is not None and not isinstance(calibration, Iterable)
        ):
            raise BitfoldError(
                f"calibration is a {type(calibration).__name__}; give a list (or any iterable) of batches, "
                "each a tensor, a tuple of arguments or a dict of keywords"
            )
        self.given = calibration is not None
        self._rest = iter(()) if calibration is None else iter(calibration)
        self._example = None if example is None else as_batch(example, "example_inputs")

    def example(self) -> Batch | None:
        """The example inputs, or else the first calibration batch (which is still there for `__iter__`)."""
        if self._example is None:
            first = next(self._rest, _END)
            if first is not _END:
                self._rest = itertools.chain([first], self._rest)
                return as_batch(first, "calibration batch 0")
        return self._example

    def check_given(self, layer: str) -> None:
        """Raises BitfoldError if there is no data for `layer`, which wants it."""
        if not self.given:
            raise BitfoldError(
                f"layer {layer} takes activations of calibrated range; give calibration=[batches], or use a "
                "recipe whose activations are quantized dynamically"
            )

    def __iter__(self) -> Iterator[Batch]:
        return (as_batch(one, f"calibration batch {index}") for index, one in enumerate(self._rest))


def record_arguments(model: nn.Module, batch: Batch, modules: Iterable[nn.Module]) -> dict[nn.Module, Any]:
    """The (args, kwargs) that each of `modules` gets first when the model runs on `batch`."""
    seen: dict[nn.Module, Any] = {}

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.setdefault(module, (args, kwargs))

    with hooked(model, dict.fromkeys(modules, remember)):
        batch.run(model)
    return seen


def observe_modules(
    model: nn.Module,
    batches: Iterable[Batch],
    observers: Mapping[nn.Module, Callable[..., Any]],
    progress: Progress | None = None,
) -> int:
    """Run every batch, and each module's arguments through its observer (a graph); the number of batches."""

    def observe(module: nn.Module, args: Any, kwargs: Any) -> None:
        with named(running):
            observers[module](*in_order(module, args, kwargs))

    count, running = 0, ""
    with hooked(model, dict.fromkeys(observers, observe)):
        for batch in batches:
            if progress is not None:
                progress(f"calibrate on batch {count}", count, 0)
            running = batch.name
            batch.run(model)
            count += 1
    return count
