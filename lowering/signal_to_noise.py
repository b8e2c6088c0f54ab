"""How far values are from what they should be, in decibels: one measure for layers, nodes and weights.

In: pairs of tensors, as many as there are. Out: 10 log10(|reference|^2 / |difference|^2), over all of them.

    ratio = Ratio(); ratio.add(exact, rounded); ratio.add(more, rounded_more); ratio.db  ->  38.4

Sums are of float64: the noise of a value that is nearly equal lies far below float32's own rounding of sums.
Infinities that are equal on both sides (an attention mask) are neither signal nor noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Ratio:
    """Sums of squares so far. compared: whether there was anything; incomparable: what was to be compared had
    no likes."""

    signal: float = 0.0
    noise: float = 0.0
    compared: bool = False
    incomparable: bool = False

    def add(self, reference: Tensor, value: Tensor) -> None:
        """Two tensors of one shape."""
        exact = reference.detach().to(torch.float64)
        signal = float(exact.square().sum())
        noise = float((value.detach().to(torch.float64) - exact).square().sum())
        # Looking for infinities takes as long as all else, and hardly ever are there any.
        if not (math.isfinite(signal) and math.isfinite(noise)):
            signal = float(finite(reference).square().sum())
            noise = float(difference(reference, value).square().sum())
        self.compared = True
        self.signal += signal
        self.noise += noise

    def compare(self, references: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Each with its like. Tensors of other shapes are not the same tokens (a router sent other ones), and
        then there is no ratio."""
        self.compared = True
        self.incomparable |= [one.shape for one in references] != [one.shape for one in values]
        if not self.incomparable:
            for reference, value in zip(references, values, strict=True):
                self.add(reference, value)

    @property
    def db(self) -> float:
        """Infinite where nothing differs, -infinite where there is noise alone, NaN for what cannot be
        compared, for nothing at all, and for values that are no numbers."""
        if self.incomparable or not self.compared:
            return math.nan
        if self.noise == 0.0:
            return math.inf
        if not math.isfinite(self.noise):
            return math.nan
        return 10.0 * math.log10(self.signal / self.noise) if self.signal > 0.0 else -math.inf


def signal_to_noise(reference: Tensor, value: Tensor) -> float:
    """Of one pair, in decibels."""
    ratio = Ratio()
    ratio.add(reference, value)
    return ratio.db


def finite(reference: Tensor) -> Tensor:
    """In float64, zero in the place of infinities."""
    exact = reference.detach().to(torch.float64)
    return torch.where(exact.isinf(), 0.0, exact)


def difference(reference: Tensor, value: Tensor) -> Tensor:
    """In float64, zero where both are equal (inf - inf is no error)."""
    exact = reference.detach().to(torch.float64)
    return torch.where(reference == value, 0.0, value.detach().to(torch.float64) - exact)
