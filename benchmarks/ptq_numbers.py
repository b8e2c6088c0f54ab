"""What is computed of per-window losses: perplexity, the share of rounding's loss that is won, intervals.

In: the loss of each window, float64 tensors in the same order. Out: numbers.

    won(loss, base, rounding)      0.6: of what rounding adds to the perplexity, 60 % is not added
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor


def perplexity(loss: Tensor) -> float:
    return math.exp(float(loss.mean()))


def won(loss: Tensor, base: Tensor, rounding: Tensor) -> float:
    """Share of what rounding adds to the perplexity that is not added."""
    lost = perplexity(rounding) - perplexity(base)
    return 1 - (perplexity(loss) - perplexity(base)) / lost if lost else math.nan


def interval(loss: Tensor, base: Tensor, rounding: Tensor | None, draws: int = 1000) -> tuple[float, float]:
    """95 % of bootstrap draws of windows, in pairs: of the perplexity, or of the share that is won."""
    draw = np.random.default_rng(0).integers(0, len(loss), (draws, len(loss)))
    means = [np.exp(part.numpy()[draw].mean(1)) for part in (loss, base)]
    found = means[0]
    if rounding is not None:
        plain = np.exp(rounding.numpy()[draw].mean(1))
        found = 1 - (means[0] - means[1]) / (plain - means[1])
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
