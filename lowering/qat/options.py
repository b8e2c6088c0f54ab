"""How a model is trained on rounded numbers: all options as one value.

In: nothing; this is data. Out: a `Qat`, checked.

    Qat(weight="lsq", activation="lsq")                     learned scales
    Qat(weight="straight+stochastic", warmup=100)           float for 100 steps, then rounded up at random
    Qat(observe=200)                                        static ranges follow the data for 200 steps

Steps are counted by `bf.advance(model)`, called after `optimizer.step()`; without an option that counts steps
nothing needs to be called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

from ...formats import BitfoldError
from ...formats.gradient import Gradient

STARTS = ("rule", "clip")


class _AsGradient:
    """A field that takes a gradient or its text, and is a `Gradient`."""

    def __init__(self, default: str) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, at: None, owner: type) -> Gradient: ...
    @overload
    def __get__(self, at: Qat, owner: type) -> Gradient: ...
    def __get__(self, at: Qat | None, owner: type) -> Gradient:
        # Of the class it is the default.
        held: Gradient | None = None if at is None else at.__dict__[self.name]
        return Gradient.parse(self.default) if held is None else held

    def __set__(self, at: Qat, value: Gradient | str) -> None:
        found = Gradient.parse(value)
        if found.item:
            raise BitfoldError("'item' is set where a graph is made, for activations; leave it out of a Qat")
        at.__dict__[self.name] = found


@dataclass(frozen=True)
class Qat:
    """weight, activation: gradients, given as a `Gradient` or its text: straight, clip, lsq, pact, smooth:5,
    each with +stochastic, +keep, +kernel, +fused (`formats/gradient.py`) or without.
    warmup: steps that train in floats. Learned scales of weights begin at its end.
    observe: steps, from the first one on whatever `warmup` is, in which the ranges of calibrated
    activations follow the data: after each step they go `rate` of the way to that step's extremes. 0:
    they stay as calibrated.
    fold_norm: fold batch norm into the convolution before it, the way that trains.
    start: where learned scales of weights begin: "rule", at those of rounding; "clip", at those of the least
    square error, which cut off the largest numbers (the pass `clip`); better for 3 bits and less.
    freeze_norm: the step from which batch norm normalizes by its running statistics; None: never.
    """

    weight: _AsGradient = _AsGradient("straight")
    activation: _AsGradient = _AsGradient("clip")
    warmup: int = 0
    observe: int = 0
    rate: float = 0.1
    fold_norm: bool = True
    freeze_norm: int | None = None
    start: str = "rule"

    def __post_init__(self) -> None:
        for name in ("warmup", "observe", "freeze_norm"):
            value = getattr(self, name)
            if value is None and name == "freeze_norm":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise BitfoldError(f"{name} is a number of steps, 0 or more, not {value!r}")
        if not isinstance(self.fold_norm, bool):
            raise BitfoldError(f"fold_norm is True or False, not {self.fold_norm!r}")
        if self.start not in STARTS:
            raise BitfoldError(f"start is one of {', '.join(STARTS)}, not {self.start!r}")
        if not isinstance(self.rate, int | float) or not 0 < self.rate <= 1:
            raise BitfoldError(f"rate is above 0 and at most 1, not {self.rate!r}")

    @property
    def activation_learns(self) -> bool:
        """Whether scales of calibrated activations are parameters."""
        return self.activation.learns
