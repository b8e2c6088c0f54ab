"""Equalize: rows of one layer and the columns of the next that reads them are given the same reach.

In: a linear, what keeps channels apart, and linears that read it. Out: a factor for each channel, without
data.

    rows reach [8 1], columns reach [2 2]:   factors [2 0.71]: rows reach [4 1.41], columns [4 1.41]

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721,
equation 11: s_i = sqrt(r1_i r2_i) / r2_i, with r1 the reach of the rows and r2 that of the columns. It helps
formats with one scale for a whole tensor, and activations; a scale for each row has the first half already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .balance import Balancer, Weights


@dataclass(frozen=True)
class Equalize(Balancer):
    """Has no options."""

    name: ClassVar[str] = "equalize"

    def factors(self, weights: Weights) -> Tensor | None:
        if not weights.rows:
            return None  # a norm's vector has no reach of its own that rounding would see
        rows = weights.rows[0].abs().amax(1)
        columns = weights.group.largest(weights.readers[0][0].abs().amax(0))
        for weight, _ in weights.readers[1:]:
            columns = columns.maximum(weights.group.largest(weight.abs().amax(0)))
        idle = (rows == 0) | (columns == 0)
        factors = (rows / columns.clamp(min=1e-12)).sqrt()
        return factors.masked_fill(idle, 1.0).clamp(1e-4, 1e4)
