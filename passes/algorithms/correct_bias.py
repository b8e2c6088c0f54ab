"""Bias correction: what rounding adds to a layer's result on average is taken off in its bias.

In: a model whose codes are decided, and data. Out: biases.

    w = [0.4 0.4] rounds to [0 0], x is [1 1] on average:  the bias gets 0.8

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721,
section 4.2, with the mean of the error measured on data rather than derived from batch norms (their appendix
D): each layer's own, its float weights against its rounded ones on the same input, so that an error that
comes from before is not corrected again in every layer behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .on_model import OnModel, Place


@dataclass(frozen=True)
class CorrectBias(OnModel):
    """add: give a bias to linears and convolutions that have none (such a model is loaded into a skeleton
    whose layers have one)."""

    name: ClassVar[str] = "correct_bias"
    place: ClassVar[Place] = "model after"

    add: bool = False
