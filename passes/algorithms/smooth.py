"""SmoothQuant: large activation channels are made smaller, and the weights that read them larger.

In: a group of linears and the statistics of what they read. Out: a factor for each channel.

    max |x| = [100 1], max |w| = [1 1], alpha 0.5:   factors [10 1]; both reach [10 1] then

Xiao et al., "SmoothQuant", arXiv 2211.10438, equation 4: s_j = max|x_j|^alpha / max|w_j|^(1 - alpha).
Channels are divided by s_j where they are made and the weights' columns multiplied by it, so a scale that a
token's channels share is no longer spent on a few of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...formats import BitfoldError
from .balance import Balancer, Weights


@dataclass(frozen=True)
class Smooth(Balancer):
    """alpha: how much of the difficulty goes to the weights; 0.5 shares it."""

    name: ClassVar[str] = "smooth"
    needs_inputs: ClassVar[bool] = True

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise BitfoldError(f"smooth takes alpha from 0 to 1, not {self.alpha}")

    def factors(self, weights: Weights) -> Tensor | None:
        assert weights.inputs is not None
        group = weights.group
        activations = group.largest(weights.inputs.peak)
        columns = [group.largest(weight.abs().amax(0)) for weight, _ in weights.readers]
        reach = columns[0]
        for other in columns[1:]:
            reach = reach.maximum(other)
        # A channel that is never active, or never read, is left alone.
        idle = (activations == 0) | (reach == 0)
        factors = activations**self.alpha / reach.clamp(min=1e-12) ** (1 - self.alpha)
        return factors.masked_fill(idle, 1.0).clamp(1e-5, 1e5)
