"""How far a compiled target may be from the reference: a bound from K and the dtypes, not from runs.

In: x, the decoded weight, the dtype of the result. Out: for each output the largest difference that two
correct ways of computing it may show.

    |x @ w.T computed one way - computed another way|  <=  tolerance(K, dtype) * (|x| @ |w|.T + |bias|)

Both ways have the same weights before they are rounded to the dtype (codes and scales are bitwise equal), and
both accumulate in float32. A sum of K products in any order, fused or not, is off by at most gamma(K + 1) *
sum |x||w| with gamma(n) = n u / (1 - n u) and u = 2**-24 (Higham, Accuracy and Stability of Numerical
Algorithms, 3.1); the scale that one form multiplies before the sum and another after it, a term that a table
splits in two, and the bias are four roundings more. The reference rounds the weight to the dtype, which the
fused form does not (one unit roundoff of the dtype), and both round the result to it (two).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32_ROUNDOFF = 2.0**-24


def roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the largest relative error of rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def gamma(operations: int, unit: float = FLOAT32_ROUNDOFF) -> float:
    """Relative error that so many roundings in a row may add up to."""
    return operations * unit / (1 - operations * unit)


def tolerance(k: int, dtype: torch.dtype = torch.float32) -> float:
    """The factor of `sum |x||w| + |bias|` for rows of k numbers and results in `dtype`."""
    return 2 * gamma(k + 5) + 3 * roundoff(dtype)


def bound(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The largest difference allowed in each output of x [..., K] times weight [N, K]: float64 [..., N]."""
    magnitude = x.abs().double() @ weight.abs().double().t()
    if bias is not None:
        magnitude = magnitude + bias.abs().double()
    return magnitude * tolerance(x.shape[-1], dtype)
