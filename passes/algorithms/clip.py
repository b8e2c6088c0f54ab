"""Clip: scales smaller (or larger) than the rule's where that costs less than the numbers it cuts off.

In: an annotated graph. Out: drafts whose scales have the least error among `steps` shares of the rule's own.

    weights [0.1 0.2 .. 1 .. 9.0] in int3:  absmax 9 / 3.5;  clip keeps 9 short and the rest exact

Each block of a weight is searched by itself, for the least sum of h_j |w_j - q_j|^p, where h_j is the mean
square of the channel that column j multiplies if `inputs` were seen, else 1. With p = 2 and no inputs this is
the MSE-optimal clipping of Banner et al., arXiv 1810.05723, by a search (as in Choukroun et al., arXiv
1902.06822) rather than by assuming a distribution; p = 2.4 is what GPTQ's own code uses for its `mse` option.

Integers of 2 to 4 bits reach further down than up (int3: -4 to 3), so a scale below 0 gives a block whose
largest number is positive the longer side (`signed`; GGUF's Q4_0 stores such scales). Of normal numbers that
takes a sixth of the squared error off at int3[g32] and a tenth at int4[g64], over clipping alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...formats import BitfoldError, Format, Integer
from ...formats.fit import Params, shrunk
from ..core import Miss
from .draft import Draft
from .solve import Solver, Task

# Past this the longer side is longer by less than a sixteenth.
_FEW_BITS = 4
# Scales that are powers of two move in whole steps; these shares reach the neighbours.
_POWERS = (0.25, 0.5, 2.0)


@dataclass(frozen=True)
class Clip(Solver):
    """least, most: the range of shares; steps: how many; norm: the p of the error; weighted: by the
    inputs; signed: scales below 0 are tried too, where the element has a longer side."""

    name: ClassVar[str] = "clip"
    decides: ClassVar[Literal["weights", "scales", "codes", ""]] = "scales"

    steps: int = 40
    least: float = 0.4
    most: float = 1.15
    norm: float = 2.0
    weighted: bool = True
    signed: bool = True

    @property
    def wants_inputs(self) -> bool:  # type: ignore[override]  # one of its options decides
        return self.weighted

    def __post_init__(self) -> None:
        if not (self.steps >= 2 and 0 < self.least < self.most < math.inf and 0 < self.norm < math.inf):
            raise BitfoldError(
                "clip tries 2 or more shares from least to most, by a positive norm, not "
                f"steps={self.steps}, least={self.least}, most={self.most}, norm={self.norm}"
            )

    def falls_short(self, task: Task) -> Miss | None:
        if self.weighted and task.inputs is None:
            return Miss("there are no statistics of what goes into it, so every column's error counts alike")
        return None

    def solve(self, task: Task) -> Draft:
        inputs = task.inputs if self.weighted else None
        channel = None if inputs is None else inputs.moment.diagonal()
        return task.draft.with_params(self.search(task.format, task.weight, channel, task.draft.params))

    def search(
        self, f: Format, w: Tensor, channel: Tensor | None = None, start: Params | None = None
    ) -> Params:
        """The best parameters for w [..., K]. `channel`: weights of the columns' errors, [K]."""
        first = f.choose(w)
        best = first if start is None else start
        least = self._error(f, w, best, channel)
        for params in self._tried(f, w, first):
            error = self._error(f, w, params, channel)
            better = error < least
            least = torch.where(better, error, least)
            best = tuple(
                torch.where(better, new, old) if new.shape == better.shape else old
                for new, old in zip(params, best, strict=True)
            )
        return best

    def _tried(self, f: Format, w: Tensor, first: Params) -> Iterator[Params]:
        both = self.signed and _has_longer_side(f)
        if both:
            yield -first[0], *first[1:]
        for share in self._shares(f):
            params = shrunk(f, w, share, first)
            yield params
            if both:
                yield -params[0], *params[1:]

    def _shares(self, f: Format) -> list[float]:
        assert f.scale is not None
        if f.scale.dtype == "e8m0":
            return list(_POWERS)
        return torch.linspace(self.most, self.least, self.steps).tolist()

    def _error(self, f: Format, w: Tensor, params: Params, channel: Tensor | None) -> Tensor:
        """The error of each block, in the scales' shape."""
        assert f.scale is not None
        error = (f.fake_quantize(w, params) - w).abs() ** self.norm
        return f.scale.granularity.means(error if channel is None else error * channel)


def _has_longer_side(f: Format) -> bool:
    """Whether scales may be below 0 (floats without a zero point), and the element is not symmetric."""
    scale, element = f.scale, f.element
    assert scale is not None
    if not isinstance(element, Integer) or not element.signed or not 2 <= element.bits <= _FEW_BITS:
        return False
    return scale.zero == "none" and scale.dtype in ("f32", "bf16", "f16")
