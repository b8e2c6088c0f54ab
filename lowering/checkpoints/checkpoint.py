"""A checkpoint as it was read: plain tensors, and weights in the codes and scales that it came with.

In: what a reader found. Out: two tables by the parameter's path in the model.

    Checkpoint("out", plain={"norm.weight": tensor}, stored={"up.weight": Stored(Quantized(int4[g128], ..))})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...formats import BitfoldError, Quantized, format


@dataclass(frozen=True)
class Stored:
    """One weight that came quantized.

    `input`: the format that the layer's activations take, "" for none; `input_params`: its scale and zero
    point where those are static. `order`: which input each column of codes belongs to, where those that share
    a scale were not neighbours. `kept`: what the file says besides and a writer needs to say it again.
    """

    weight: Quantized
    input: str = ""
    input_params: tuple[Tensor, ...] = ()
    order: Tensor | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = [part for part in format(self.input).parts if part != "codes"] if self.input else []
        if self.input_params and len(self.input_params) != len(wanted):
            raise BitfoldError(
                f"activations in {self.input} have static {', '.join(wanted)}, not "
                f"{len(self.input_params)} tensors"
            )


@dataclass(frozen=True)
class Checkpoint:
    """`source`: how messages call it. `dtype`: what layers of a skeleton on meta compute in; None if the
    checkpoint does not say. `unused`: why a tensor of it has no place in the model, by its name.
    """

    source: str
    plain: Mapping[str, Tensor]
    stored: Mapping[str, Stored]
    dtype: torch.dtype | None = None
    unused: Mapping[str, str] = field(default_factory=dict)
