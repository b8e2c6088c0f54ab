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

from ...formats.hadamard import hadamard_matrix
from .on_model import OnModel, Place


@dataclass(frozen=True)
class Rotate(OnModel):
    """seed: of the signs; online: also before linears that write into the stream, by an operator."""

    name: ClassVar[str] = "rotate"
    place: ClassVar[Place] = "model before"

    seed: int = 0
    online: bool = True

    def matrix(self, width: int, device: torch.device) -> Tensor:
        """R, float64 [width, width]."""
        signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(self.seed)) * 2.0 - 1
        return (signs.double()[:, None] * hadamard_matrix(width)).to(device)
