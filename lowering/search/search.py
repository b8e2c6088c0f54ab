"""`bf.search`: a format for each layer, so that a budget is kept and the least is lost.

In: a model, data, a budget. Out: a `Recipe` that prints, saves and quantizes.

    recipe = bf.search(model, batches, budget="4.2 bits")             the best model of that size
    recipe = bf.search(model, batches, budget="0.5% perplexity")      the smallest model that is this good
    recipe = bf.search(model, batches, budget="40 ms")                the best one that is this fast
    bf.quantize(model, recipe, algorithm="clip,gptq", calibration=batches)

Each layer is rounded alone, in each candidate format (`sensitivity.py`), or its loss estimated (`trace.py`);
the losses of a recipe are taken to add up, and the choice is an integer program, one choice a layer, that
scipy's HiGHS solves to the optimum:

    least sum of losses,   sum of bits <= budget                      (bits)
    least sum of bits,     sum of losses <= log(1 + share)            (perplexity)
    least sum of losses,   sum of seconds <= budget                   (ms, one batch; `times.py`)

Losses do not quite add up, and estimates may be off by any factor, so for a perplexity recipes are run as a
whole: larger ones until it holds, smaller ones as long as it does (`smallest.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...formats import BitfoldError
from ...passes.core import Progress
from ...passes.recipes import Recipe
from ..algorithms.calibration import Batches
from ..given_model import module_of
from ..outputs import divergence
from ..parameters import check_parameters
from .integer_program import check_time, fewest_losses, fewest_losses_in_time, scipy
from .sensitivity import Loss, Sensitivity, sensitivity
from .smallest import smallest
from .times import Times, measure_times, model_times
from .trace import trace_sensitivity

CANDIDATES = ("int8[g128]", "int6[g64]", "int5[g64]", "int4[g32]", "int4[g128]", "int3[g32]", "int2[g32]")
"""Formats that are tried by default, where they fit."""


@dataclass(frozen=True)
class Budget:
    """amount bits a weight, or a perplexity that is `amount` (a share: 0.005) higher, or seconds."""

    kind: Literal["bits", "perplexity", "seconds"]
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """ "4.2 bits", "40 ms" or "0.5% perplexity". Raises BitfoldError for anything else."""
        pattern = r"\s*([0-9]+(?:\.[0-9]+)?)\s*(bits|ms|us|%\s*perplexity)\s*"
        found = re.fullmatch(pattern, text) if isinstance(text, str) else None
        if found is None or float(found[1]) <= 0:
            raise BitfoldError(
                f"a budget is text such as '4.2 bits', '40 ms' or '0.5% perplexity', not {text!r}"
            )
        if found[2] == "bits":
            return cls("bits", float(found[1]))
        if found[2] in ("ms", "us"):
            return cls("seconds", float(found[1]) * (1e-3 if found[2] == "ms" else 1e-6))
        return cls("perplexity", float(found[1]) / 100)


@torch.no_grad()
def search(
    model: nn.Module,
    data: Iterable[Any],
    *,
    budget: str,
    formats: Sequence[str] = CANDIDATES,
    loss: Loss | None = None,
    table: Sensitivity | None = None,
    by: Literal["measured", "trace"] = "measured",
    times: Times | None = None,
    progress: Progress | None = None,
) -> Recipe:
    """The recipe for the model's linears within `budget`; the model is only run.

    - data: batches, as calibration takes them
    - formats: candidates for each layer
    - loss: as `sensitivity` takes it; by default the divergence from the float model's predictions
    - table: a `Sensitivity` that was measured before, so that several budgets cost one measurement
    - by: "measured", each layer rounded in each format; "trace", estimated by a few backward passes
    - times: seconds of layers, for a budget of time: by default those of the cost model for a model on a GPU,
      and measured on the first batch for one on a CPU

    Raises BitfoldError for a budget that no choice keeps, naming the nearest that one does.
    """
    wanted = Budget.parse(budget)
    model = module_of(model, "bf.search")
    check_parameters(model)
    _check(formats, loss, table, times)
    scipy()
    Batches(data, None)  # a tensor is one batch, and would be taken apart into rows
    batches = [] if data is None else list(data)
    if by not in ("measured", "trace"):
        raise BitfoldError(f"by is 'measured' or 'trace', not {by!r}")
    if wanted.kind == "perplexity" and not batches:
        raise BitfoldError(
            f"a budget of {budget!r} runs whole recipes on data; give batches, also with table="
        )
    if table is not None:
        table.check_of(model)
    if wanted.kind == "seconds":  # first, being done sooner than the table of losses
        times = times or _times(model, batches, formats)
        check_time(times, times.fastest, wanted.amount)
    found = _table(model, batches, formats, loss, by, progress) if table is None else table
    name = f"search {budget}"
    if wanted.kind == "bits":
        return found.recipe(fewest_losses(found, wanted.amount), name)
    if wanted.kind == "seconds" and times is not None:
        chosen = fewest_losses_in_time(found, times, wanted.amount)
        return found.recipe(
            chosen, name, f"; {1e3 * times.total(found.everywhere(chosen)):.3g} ms ({times.about})"
        )
    return smallest(model, batches, found, wanted.amount, name, loss or divergence, progress)


def _check(formats: Any, loss: Any, table: Any, times: Any) -> None:
    """BitfoldError for arguments of another kind."""
    if isinstance(formats, str) or not isinstance(formats, Sequence) or not formats:
        raise BitfoldError(f"formats is a list of formats such as ['int8', 'int4[g32]'], not {formats!r}")
    for name, given, kind in (("table", table, Sensitivity), ("times", times, Times)):
        if given is not None and not isinstance(given, kind):
            raise BitfoldError(f"{name} is a {kind.__name__}, not a {type(given).__name__}")
    if loss is not None and not callable(loss):
        raise BitfoldError(f"loss is a function of (float output, output), not {loss!r}")


def _table(
    model: nn.Module,
    data: Sequence[Any],
    formats: Sequence[str],
    loss: Loss | None,
    by: str,
    progress: Progress | None,
) -> Sensitivity:
    if by == "measured":
        return sensitivity(model, data, formats, loss=loss, progress=progress)
    if by != "trace" or loss is not None:
        raise BitfoldError(
            f"by is 'measured' or 'trace', and a loss of your own can only be measured, not by={by!r} with "
            f"loss={loss!r}"
        )
    return trace_sensitivity(model, data, formats, progress=progress)


def _times(model: nn.Module, data: Sequence[Any], formats: Sequence[str]) -> Times:
    on = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return model_times(model, data, formats) if on == "cuda" else measure_times(model, data, formats)
