"""Passes of an algorithm that work on a model: its blocks, or the whole of it, not one weight at a time.

In: options, and the place in an algorithm where the pass has its turn. Out: a pass that an algorithm's text
names; what it does is a function registered for it (`lowering/algorithms/places.py`).

    @register_pass
    @dataclass(frozen=True)
    class Halve(OnModel):
        name: ClassVar[str] = "halve"
        place: ClassVar[Place] = "block after"

The places, in the order of an algorithm:

    model before    before anything is decided: rotate
    block before    each block, before its weights are solved: awq, smooth, equalize
                    (solvers: one weight at a time, solve.py)
    block after     each block, when its weights are solved: learn
    model after     when all codes are decided: tune, correct_bias
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch.fx import GraphModule

from ...formats import BitfoldError
from ..core import Pass
from ..stages import Stage

Place = Literal["model before", "block before", "block after", "model after"]


@dataclass(frozen=True)
class OnModel(Pass):
    """place: when it has its turn."""

    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.annotated, Stage.observed)
    place: ClassVar[Place]

    def apply(self, gm: GraphModule) -> int:
        """Not on a graph: what it looks at is in many modules, and runs on a model's data."""
        raise BitfoldError(
            f"{self.name} works on a model's modules, not on a graph: "
            f"bf.quantize(model, ..., algorithm='..{self.name}..', calibration=batches)"
        )
