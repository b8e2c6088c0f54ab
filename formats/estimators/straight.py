"""straight: the gradient goes straight through, as if nothing had been rounded.

In: the gradient of what came out. Out: the same for what went in.

    dv/dx = 1 everywhere (Bengio et al., 1308.3432)
"""

from __future__ import annotations

from torch import Tensor

from .estimator import Back, Estimator


class Straight(Estimator):
    """1 everywhere."""

    name = "straight"
    identity = True

    def for_x(self, back: Back) -> Tensor:
        """All of it."""
        return back.flow
