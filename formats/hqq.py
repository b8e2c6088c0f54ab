"""Half-quadratic quantization: a zero point that fits the data better than the minimum does.

In: weights [..., K] and their groups. Out: scale and float zero point of each group.

The error W - dequantize(quantize(W)) is split into outliers (a shrinkage with a p-norm of 0.7) and a rest
that the zero point absorbs; the two are found in turn, at most twenty times, until the mean error over the
whole tensor no longer falls (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models",
2023). The stop is a mask, not a branch, so that the operators trace.

This is the rule `hqq` of a scale, as its authors' kernels want it: with a float zero point, the best round
of the whole tensor, and 4 bits' rounded zero. For every other format, with the best round of each block,
there is the pass `hqq` of an algorithm (`passes/algorithms/hqq.py`). Their shrinkages differ in the last bit
(a product with 1 / beta here, a quotient there), which is why each has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .granularity import Granularity
from .integer import Integer

_NORM = 0.7
_BETA = 10.0
_GROWTH = 1.01
_ROUNDS = 20
# Steps per unit are bounded so that a constant group has a finite scale; the bound is the public one.
_MOST_STEPS = 2e4


def fit(element: Integer, granularity: Granularity, x: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, smallest value) of each block, float32: value = code * scale + smallest."""
    low, high = granularity.extremes(x)
    steps = (float(element.last) / (high - low)).clamp(max=_MOST_STEPS)
    zero = -low * steps
    if element.bits == 4:
        zero = torch.round(zero)  # the public definition does this for 4 bits only
    blocks = granularity.split(x)
    wide = granularity.spread(steps)
    beta = _BETA
    best = x.new_full((), 1e4)
    going = torch.ones_like(best, dtype=torch.bool)
    for _ in range(_ROUNDS):
        shift = granularity.spread(zero)
        codes = torch.round(blocks * wide + shift).clamp(0, element.last)
        error = blocks - (codes - shift) / wide
        outliers = _shrink(error, beta)
        better = granularity.means((codes - (blocks - outliers) * wide).reshape(x.shape))
        zero = torch.where(going, better, zero)
        size = error.abs().mean()
        going = going & (size < best)
        best = torch.minimum(best, size)
        beta *= _GROWTH
    scale = 1.0 / steps
    return scale, -zero * scale


def _shrink(error: Tensor, beta: float) -> Tensor:
    size = error.abs()
    return error.sign() * torch.relu(size - (1.0 / beta) * size.pow(_NORM - 1))
