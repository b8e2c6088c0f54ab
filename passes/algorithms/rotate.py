"""Rotate: the residual stream turned by an orthogonal matrix, so that no channel stands out.

In: a decoder. Out: the same function, its embedding, norms and linears holding rotated weights; and with
`online`, linears that write into the stream read their input through a transform that is run each time.

    x = [100 1 1 1] at every token, in int4:  one scale for 100, the rest is lost
    x R = [51.5 49.5 49.5 49.5]:              all of one size

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456: R is a Hadamard
matrix with random signs (`formats/hadamard.py`), folded into the parameters that `residual.py` finds. Where
no weight makes the channels, before the linears that end attention and MLP, the transform is an operator
(`bitfold::hadamard`), whose inverse is in the weight. Use it where activations are rounded too; weights
alone gain where their own channels stand out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from ...formats import BitfoldError
from ...formats.hadamard import hadamard_matrix
from ..core import Pass
from ..stages import Stage


@dataclass(frozen=True)
class Rotate(Pass):
    """seed: of the signs; online: also before linears that write into the stream, by an operator."""

    name: ClassVar[str] = "rotate"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.annotated, Stage.observed)

    seed: int = 0
    online: bool = True

    def apply(self, gm: GraphModule) -> int:
        """Not on a module's graph: what makes the stream and what reads it are in many."""
        raise BitfoldError(
            f"{self.name} turns a whole model: bf.quantize(model, ..., algorithm='rotate,...')"
        )

    def matrix(self, width: int, device: torch.device) -> Tensor:
        """R, float64 [width, width]."""
        signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(self.seed)) * 2.0 - 1
        return (signs.double()[:, None] * hadamard_matrix(width)).to(device)
