"""`bf.search`: a format for each layer, so that a budget is kept and the least is lost.

In: a model, data, a budget. Out: a `Recipe` that prints, saves and quantizes.

    recipe = bf.search(model, batches, budget="4.2 bits")             the best model of that size
    recipe = bf.search(model, batches, budget="0.5% perplexity")      the smallest model that is this good
    recipe = bf.search(model, batches, budget="40 ms")                the best one that is this fast
    bf.quantize(model, recipe, algorithm="clip,gptq", calibration=batches)

Each layer is rounded alone, in each candidate format (`sensitivity.py`), or its loss estimated (`trace.py`);
the losses of a recipe are taken to
add up, and the choice is an integer program, one choice a layer, that scipy's HiGHS solves to the optimum:

    least sum of losses,   sum of bits <= budget                      (bits)
    least sum of bits,     sum of losses <= log(1 + share)            (perplexity)
    least sum of losses,   sum of seconds <= budget                   (ms, one batch; `times.py`)

Losses do not quite add up, so a recipe for a perplexity is run, and the program solved again with the losses
scaled to what was seen, until it holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...formats import BitfoldError
from ...passes.algorithms.draft import DRAFT
from ...passes.core import Progress
from ...passes.note import annotated
from ...passes.recipes import Recipe
from ..algorithms.at_rest import at_rest
from ..algorithms.calibration import Batches
from ..diagnose import first_output
from ..given_model import module_of
from ..module_scope import plan
from ..swaps import Swaps
from .sensitivity import Choice, Loss, Sensitivity, divergence, round_site, sensitivity
from .times import Times, measured, modeled
from .trace import trace_sensitivity

CANDIDATES = ("int8[g128]", "int6[g64]", "int5[g64]", "int4[g32]", "int4[g128]", "int3[g32]", "int2[g32]")
"""Formats that are tried by default, where they fit."""

_ROUNDS = 6


@dataclass(frozen=True)
class Budget:
    """amount bits a weight, or a perplexity that is `amount` (a share: 0.005) higher, or seconds."""

    kind: Literal["bits", "perplexity", "seconds"]
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """ "4.2 bits", "40 ms" or "0.5% perplexity". Raises BitfoldError for anything else."""
        pattern = r"\s*(\d+(?:\.\d+)?)\s*(bits|ms|us|%\s*perplexity)\s*"
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
    _scipy()
    batches = list(data)
    if wanted.kind == "seconds":  # first, being done sooner than the table of losses
        times = times or _times(model, batches, formats)
        _check_time(times, times.least, wanted.amount)
    found = table or _table(model, batches, formats, loss, by, progress)
    if wanted.kind == "bits":
        chosen = fewest_losses(found, wanted.amount)
        return found.recipe(chosen, f"search {budget}")
    if wanted.kind == "seconds" and times is not None:
        chosen = fastest(found, times, wanted.amount)
        return found.recipe(
            chosen, f"search {budget}", f"; {1e3 * times.total(chosen):.3g} ms ({times.about})"
        )
    return _within(model, batches, found, wanted.amount, budget, loss or divergence)


def _within(
    model: nn.Module, data: Sequence[Any], table: Sensitivity, share: float, budget: str, loss: Loss
) -> Recipe:
    """The smallest recipe that, run as a whole, loses no more than this share of the perplexity."""
    most, scale = math.log1p(share), 1.0
    finest = [min(table.of(layer), key=lambda one: one.loss) for layer in table.numel]
    least = sum(choice.loss for choice in finest)
    for left in reversed(range(_ROUNDS)):
        can = left > 0 and least <= most / scale
        chosen = fewest_bits(table, most / scale) if can else finest
        recipe = table.recipe(chosen, f"search {budget}")
        seen = _measured(model, recipe, data, loss)
        if seen <= most:
            return recipe
        if not can:
            break
        scale *= max(seen / most, 1.05)
    raise BitfoldError(
        f"the finest formats for each layer lose {_percent(seen)} together, more than {_percent(most)}; add "
        "finer ones"
    )


def _percent(loss: float) -> str:
    """Of perplexity, for a loss in nats."""
    return f"{100 * math.expm1(loss):.3g}%"


def _table(
    model: nn.Module,
    data: Sequence[Any],
    formats: Sequence[str],
    loss: Loss | None,
    by: str,
    step: Progress | None,
) -> Sensitivity:
    if by == "measured":
        return sensitivity(model, data, formats, loss=loss, progress=step)
    if by != "trace" or loss is not None:
        raise BitfoldError(
            f"by is 'measured' or 'trace', and a loss of your own can only be measured, not by={by!r} with "
            f"loss={loss!r}"
        )
    return trace_sensitivity(model, data, formats, progress=step)


def _times(model: nn.Module, data: Sequence[Any], formats: Sequence[str]) -> Times:
    on = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return modeled(model, data, formats) if on == "cuda" else measured(model, data, formats)


def fastest(table: Sensitivity, times: Times, seconds: float) -> list[Choice]:
    """One choice a layer: the least sum of losses within so many seconds of the whole model."""
    each = {choice: times.of(choice.layer, choice.format) for choice in table.choices}
    least = times.rest + sum(min(each[choice] for choice in table.of(layer)) for layer in table.numel)
    _check_time(times, least, seconds)
    losses = [choice.loss for choice in table.choices]
    return _solve(table, losses, [each[choice] for choice in table.choices], seconds - times.rest)


def _check_time(times: Times, least: float, seconds: float) -> None:
    if least > seconds:
        raise BitfoldError(
            f"the fastest formats for each layer take {1e3 * least:.3g} ms ({1e3 * times.rest:.3g} ms of "
            f"them outside the layers), more than {1e3 * seconds:.3g} ms; {times.about}"
        )


def fewest_losses(table: Sensitivity, bits: float) -> list[Choice]:
    """One choice a layer: the least sum of losses within so many bits a weight."""
    total = sum(table.numel.values())
    least = sum(min(choice.bits for choice in table.of(layer)) for layer in table.numel)
    if least > bits * total:
        raise BitfoldError(
            f"the smallest formats for each layer take {least / total:.3f} bits a weight, more than {bits}; "
            "add smaller formats"
        )
    return _solve(table, [c.loss for c in table.choices], [c.bits for c in table.choices], bits * total)


def fewest_bits(table: Sensitivity, loss: float) -> list[Choice]:
    """One choice a layer: the least sum of bits within so much loss."""
    least = sum(min(choice.loss for choice in table.of(layer)) for layer in table.numel)
    if least > loss:
        raise BitfoldError(
            f"the finest formats for each layer lose {_percent(least)}, more than {_percent(loss)}; add "
            "finer ones"
        )
    return _solve(table, [c.bits for c in table.choices], [c.loss for c in table.choices], loss)


def pareto(table: Sensitivity, points: int = 20) -> list[tuple[float, float]]:
    """(bits a weight, sum of losses) of the best recipes, from the smallest to the finest."""
    total = sum(table.numel.values())
    ends = [
        sum(pick(choice.bits for choice in table.of(layer)) for layer in table.numel) / total
        for pick in (min, max)
    ]
    found = []
    for step in range(points):
        # The first end is met exactly, which rounding must not take for too little.
        bits = ends[0] + (ends[1] - ends[0]) * step / max(points - 1, 1) + 1e-9
        chosen = fewest_losses(table, bits)
        found.append((sum(c.bits for c in chosen) / total, sum(c.loss for c in chosen)))
    return found


def _scipy() -> tuple[Any, Any]:
    """numpy and scipy's solvers, which are looked for before anything is measured."""
    try:
        import numpy as np
        from scipy import optimize
    except ImportError as error:
        raise BitfoldError("bf.search wants scipy: run `pip install 'bitfold[search]'`") from error
    return np, optimize


def _solve(table: Sensitivity, cost: Sequence[float], weight: Sequence[float], most: float) -> list[Choice]:
    """The integer program: least cost, one choice a layer, weights within `most`."""
    np, optimize = _scipy()
    layers = list(table.numel)
    rows = np.zeros((len(layers), len(table.choices)))
    for column, choice in enumerate(table.choices):
        rows[layers.index(choice.layer), column] = 1
    # HiGHS works to absolute tolerances of 1e-6 and less: both rows in units of their own size.
    unit, size = max(map(abs, cost)) or 1.0, abs(most) or 1.0
    found = optimize.milp(
        np.array(cost) / unit,
        constraints=[
            optimize.LinearConstraint(rows, 1, 1),
            optimize.LinearConstraint(np.array(weight)[None] / size, -np.inf, most / size),
        ],
        integrality=np.ones(len(cost)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise BitfoldError(f"the solver found no choice within the budget: {found.message}")
    return [choice for choice, taken in zip(table.choices, found.x, strict=True) if taken > 0.5]


def _measured(model: nn.Module, recipe: Recipe, data: Sequence[Any], loss: Loss) -> float:
    """The loss of the whole recipe, weights rounded to the nearest."""
    batches = list(Batches(data, None))
    with at_rest(model):
        exact = [first_output(model, batch) for batch in batches]
        with Swaps() as swaps:
            for site in plan(model, recipe, stored={}).sites:
                round_site(site)
                swaps.put(site)
                for node, _ in annotated(site.gm):
                    node.meta.pop(DRAFT, None)
            outputs = [first_output(model, batch) for batch in batches]
    total = sum(float(loss(before, after)) for before, after in zip(exact, outputs, strict=True))
    return total / len(batches)
