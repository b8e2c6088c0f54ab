"""One choice a layer, so that a sum is least and another keeps a budget: an integer program, solved by scipy.

In: a `Sensitivity`, a budget. Out: a choice for each layer, of the optimum.

    fewest_losses(table, 4.2)                     the least sum of losses within 4.2 bits a weight
    fewest_bits(table, 0.01)                      the least sum of bits within a sum of losses of 0.01
    fewest_losses_in_time(table, times, 0.04)     the least sum of losses within 40 ms
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...formats import BitfoldError
from .sensitivity import Choice, Sensitivity, percent
from .times import Times


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
    least = sum(choice.loss for choice in finest(table))
    if least > loss:
        raise BitfoldError(
            f"the finest formats for each layer lose {percent(least)}, more than {percent(loss)}; add "
            "finer ones"
        )
    return _solve(table, [c.bits for c in table.choices], [c.loss for c in table.choices], loss)


def fewest_losses_in_time(table: Sensitivity, times: Times, seconds: float) -> list[Choice]:
    """One choice a layer: the least sum of losses within so many seconds of the whole model."""
    each = {
        choice: sum(times.of(one.layer, one.format) for one in table.everywhere([choice]))
        for choice in table.choices
    }
    least = times.rest + sum(min(each[choice] for choice in table.of(layer)) for layer in table.numel)
    check_time(times, least, seconds)
    losses = [choice.loss for choice in table.choices]
    return _solve(table, losses, [each[choice] for choice in table.choices], seconds - times.rest)


def check_time(times: Times, least: float, seconds: float) -> None:
    """BitfoldError if the fastest recipe takes longer."""
    if least > seconds:
        raise BitfoldError(
            f"the fastest formats for each layer take {1e3 * least:.3g} ms ({1e3 * times.rest:.3g} ms of "
            f"them outside the layers), more than {1e3 * seconds:.3g} ms; {times.about}"
        )


def finest(table: Sensitivity) -> list[Choice]:
    """The choice of the least loss for each layer; of equal ones the smallest."""
    return [min(table.of(layer), key=lambda one: (one.loss, one.bits)) for layer in table.numel]


def bits_of(table: Sensitivity, chosen: Iterable[Choice]) -> float:
    """Bits a weight, scales included."""
    return sum(choice.bits for choice in chosen) / sum(table.numel.values())


def pareto(table: Sensitivity, points: int = 20) -> list[tuple[float, float]]:
    """(bits a weight, sum of losses) of the best recipes, from the smallest to the finest."""
    ends = [
        bits_of(table, (pick(table.of(layer), key=lambda one: one.bits) for layer in table.numel))
        for pick in (min, max)
    ]
    found = []
    for step in range(points):
        # The first end is met exactly, which rounding must not take for too little.
        bits = ends[0] + (ends[1] - ends[0]) * step / max(points - 1, 1) + 1e-9
        chosen = fewest_losses(table, bits)
        found.append((bits_of(table, chosen), sum(choice.loss for choice in chosen)))
    return found


def scipy() -> tuple[Any, Any]:
    """numpy and scipy's solvers, which are looked for before anything is measured."""
    try:
        import numpy as np
        from scipy import optimize
    except ImportError as error:
        raise BitfoldError("bf.search wants scipy: run `pip install 'bitfold[search]'`") from error
    return np, optimize


def _solve(table: Sensitivity, cost: Sequence[float], weight: Sequence[float], most: float) -> list[Choice]:
    """The integer program: least cost, one choice a layer, weights within `most`."""
    np, optimize = scipy()
    layers = list(table.numel)
    rows = np.zeros((len(layers), len(table.choices)))
    for column, choice in enumerate(table.choices):
        rows[layers.index(choice.layer), column] = 1
    # What is too much with the least of all other layers is no choice; HiGHS takes 1e20 for infinity.
    lightest = np.where(rows > 0, np.array(weight), np.inf).min(1)
    least = lightest[rows.argmax(0)]
    allowed = lightest.sum() + np.array(weight) - least <= most + 1e-9 * abs(most)
    # HiGHS works to absolute tolerances of 1e-6 and less: both rows in units of their own size.
    unit = max(abs(one) for one, taken in zip(cost, allowed, strict=True) if taken) or 1.0
    size = abs(most) or 1.0
    found = optimize.milp(
        np.where(allowed, cost, 0.0) / unit,
        constraints=[
            optimize.LinearConstraint(rows, 1, 1),
            optimize.LinearConstraint(np.where(allowed, weight, least)[None] / size, -np.inf, most / size),
        ],
        integrality=np.ones(len(cost)),
        bounds=optimize.Bounds(0, allowed.astype(float)),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise BitfoldError(f"the solver found no choice within the budget: {found.message}")
    return [choice for choice, taken in zip(table.choices, found.x, strict=True) if taken > 0.5]
