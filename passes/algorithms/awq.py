"""AWQ: channels that carry much are made larger before rounding, so that their weights are rounded less
coarsely.

In: a group of linears, their formats and the statistics of what they read. Out: a factor for each channel.

    mean |x| = [8 1], alpha 0.5:   factors [1.68 0.59]: the first column has steps 2.8 times as fine

Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv 2306.00978. The factor of a channel is its mean
magnitude to the power of alpha, normalized so that the largest times the smallest is 1; alpha is the one of a
grid in [0, 1] whose rounded weights have the least output error. The paper measures that error on the block's
output; here it is that of the group's linears together, which their input's second moment gives exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...formats import BitfoldError
from .balance import Balancer, Weights
from .clip import Clip


@dataclass(frozen=True)
class AWQ(Balancer):
    """steps: how many alphas; clip: judge each alpha with clipped scales, as when `clip` follows."""

    name: ClassVar[str] = "awq"
    needs_inputs: ClassVar[bool] = True

    steps: int = 20
    clip: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BitfoldError(f"awq tries 1 or more alphas, not {self.steps}")

    def factors(self, weights: Weights) -> Tensor | None:
        inputs = weights.inputs
        assert inputs is not None
        size = weights.group.largest(inputs.magnitude).clamp(min=1e-8)
        best, least = None, self._error(weights, torch.ones_like(size))
        for step in range(1, self.steps + 1):
            powered = size ** (step / self.steps)
            factors = (powered / (powered.max() * powered.min()).sqrt()).clamp(1e-4, 1e4)
            error = self._error(weights, factors)
            if error < least:
                best, least = factors, error
        return best

    def _error(self, weights: Weights, factors: Tensor) -> float:
        """Output error of the readers when rounded under these factors."""
        assert weights.inputs is not None
        wide, total = weights.group.spread(factors), 0.0
        search = Clip(steps=10, least=0.6)
        for weight, fmt in weights.readers:
            if fmt is None:
                continue
            scaled = weight * wide
            channel = weights.inputs.moment.diagonal() / wide.square()
            params = search.search(fmt, scaled, channel) if self.clip else None
            rounded = fmt.fake_quantize(scaled, params) / wide
            total += float(weights.inputs.error(rounded - weight).sum())
        return total
