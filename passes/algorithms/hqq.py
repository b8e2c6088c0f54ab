"""HQQ: scales or zero points that fit all but the outliers, found without data.

In: an annotated graph. Out: drafts with scales and zeros of the least p-norm of errors that was seen.

    block [-1 .. 1 and one 9]:   the half-quadratic split takes the 9 for an outlier; the others get the steps

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. The error W - Q(W) is
split into outliers E, by the shrinkage of the p-norm (p = 0.7), and a rest that the parameters absorb:

    E  <- sign(r) relu(|r| - |r|^(p - 1) / beta),   r = W - Q(W)
    parameters <- least squares of W - E on the codes;    beta <- 1.01 beta

A zero point is what the paper moves; a format without one has its scale moved instead, by the same argument.
Each block keeps the parameters of its least error. A format whose scale has the rule `hqq` does this by
itself (`formats/hqq.py`), for the whole tensor at once and traceably; this pass is for any format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...formats import BitfoldError, Format, Integer
from ...formats.fit import Params, multipliers, with_multipliers
from .draft import Draft
from .solve import Solver, Task


@dataclass(frozen=True)
class HQQ(Solver):
    """norm: p; beta and growth: of the shrinkage, in steps of the block's scale; rounds: at most."""

    name: ClassVar[str] = "hqq"
    decides: ClassVar[Literal["weights", "scales", "codes", ""]] = "scales"

    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    rounds: int = 20

    def __post_init__(self) -> None:
        shrinks = 0 < self.beta < math.inf and 1 <= self.growth < math.inf
        if not (0 < self.norm <= 1 and shrinks and self.rounds >= 1):
            raise BitfoldError(f"hqq takes 0 < norm <= 1, beta > 0, growth >= 1 and rounds >= 1, not {self}")

    def solve(self, task: Task) -> Draft:
        f, w = task.format, task.weight
        params = task.draft.chosen(f)
        best, least, beta = params, self._size(f, w, params), self.beta
        for _ in range(self.rounds):
            params = self._moved(f, w, params, beta)
            size = self._size(f, w, params)
            better = size < least
            least = torch.where(better, size, least)
            best = tuple(
                torch.where(better, new, old) if new.shape == better.shape else old
                for new, old in zip(params, best, strict=True)
            )
            beta *= self.growth
        return task.draft.with_params(best)

    def _moved(self, f: Format, w: Tensor, params: Params, beta: float) -> Params:
        """The next parameters: least squares on what is no outlier."""
        assert f.scale is not None
        grain = f.scale.granularity
        old = multipliers(f, params)
        unit = grain.spread(torch.where(old == 0, 1.0, old)).abs()
        values = f.fake_quantize(w, params)
        error = grain.split(w - values) / unit
        outliers = (_shrink(error, beta, self.norm) * unit).reshape(w.shape)
        kept = w - outliers
        if f.scale.zero == "none":
            codes = (grain.split(values) / unit).reshape(w.shape)
            power = grain.means(codes * codes)
            fitted = grain.means(kept * codes) / torch.where(power == 0, 1.0, power) * old.sign()
            return with_multipliers(f, params, torch.where((power == 0) | (fitted * old <= 0), old, fitted))
        shift = grain.means(kept - values)
        if f.scale.zero == "int":
            element = f.element
            assert isinstance(element, Integer)
            zeros = params[1].to(torch.float32) - shift / old
            bounded = zeros.round().clamp(element.first, element.last)
            return (params[0], bounded.to(params[1].dtype))
        return (params[0], (params[1].to(torch.float32) + shift).to(params[1].dtype))

    def _size(self, f: Format, w: Tensor, params: Params) -> Tensor:
        """The p-norm of each block's errors, in the scales' shape."""
        assert f.scale is not None
        return f.scale.granularity.means((f.fake_quantize(w, params) - w).abs() ** self.norm)


def _shrink(error: Tensor, beta: float, norm: float) -> Tensor:
    size = error.abs()
    return error.sign() * torch.relu(size - size.clamp(min=1e-12).pow(norm - 1) / beta)
