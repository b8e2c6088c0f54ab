"""A gradient that a user adds, in one file: element-wise gradient scaling (EWGS, arXiv 2104.00903).

dL/dx = g (1 + d sign(g) (x - v) / step)      g: the gradient of what came out
"""

from __future__ import annotations

from torch import Tensor

from bitfold.formats import Format
from bitfold.formats.estimators import Back, Estimator, Kernel


class Ewgs(Estimator):
    """ewgs:d"""

    name = "ewgs"
    number = 0.1

    def for_x(self, back: Back) -> Tensor:
        assert back.number is not None
        way = (back.numbers - back.value) / back.step
        return back.flow * (1.0 + back.number * back.flow.sign() * way)

    def kernel(self, fmt: Format, number: float | None) -> Kernel:
        return Kernel(
            f"g * (1.0 + {number!r} * sign * way)",
            lines=(
                "way = tl.div_rn(v - value, safe)",
                "sign = tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, 0.0))",
            ),
        )
