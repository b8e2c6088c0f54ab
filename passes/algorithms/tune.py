"""Tune: rounding, scales, norms and biases once more, by what the whole model predicts.

In: a model whose codes are decided. Out: the same formats; codes, scales and vectors that bring the rounded
model's predictions nearest to the float model's.

    every block's output is as near as it goes, and they still add up to 18 thousandths of a nat;  tune: 11

Blocks that are solved one after the other do not know what the blocks behind make of their errors. Here the
float model teaches the rounded one as a whole: the divergence of its predictions (Kullback-Leibler) is
lowered by Adam, whose leaves are how each number is rounded, the scales, and the parameters of one dimension
that take no codes. That is the second phase of EfficientQAT (Chen et al., arXiv 2407.11062), which moves
scales, with the vectors of Li et al., "Norm Tweaking" (arXiv 2309.02784), and rounding. It wants memory for
the whole model several times over, like training; no other pass does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...formats import BitfoldError
from .on_model import OnModel, Place


@dataclass(frozen=True)
class Tune(OnModel):
    """steps: of descent, a calibration batch each; rate: the first step of a number, in spacings of its
    format; scales, vectors: those of scales and of vectors, as shares of (the mean of) themselves (0: they
    stay); aim: "predictions", the softmax of the result's last dimension, or "result", its squared error."""

    name: ClassVar[str] = "tune"
    place: ClassVar[Place] = "model after"

    steps: int = 200
    rate: float = 0.005
    scales: float = 0.0005
    vectors: float = 0.0005
    aim: Literal["predictions", "result"] = "predictions"

    def __post_init__(self) -> None:
        rates = (self.rate, self.scales, self.vectors)
        if self.steps < 1 or not all(0 <= rate < 1 for rate in rates) or not sum(rates) > 0:
            raise BitfoldError(
                f"tune takes 1 or more steps and rates from 0 to 1, one of them above 0, not {self}"
            )
