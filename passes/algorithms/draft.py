"""A weight on its way to codes: what the algorithms so far have decided about it.

In: an anchor's weight, float32 [..., K]. Out, in `node.meta` of the anchor: a `Draft`, which each algorithm
of a pipeline makes more definite, and which `fold` turns into codes.

    Draft(weight)                       round to nearest, scales by the format's rule
    Draft(weight, params)               scales are chosen (clip, hqq)
    Draft(weight, params, values)       every number is (gptq, learned rounding)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...formats import Format, Quantized
from ..anchors import BATCHED, TARGETS, rows_shape
from ..constants import expression
from ..note import Note

DRAFT = "bitfold_draft"
"""In `node.meta` of an anchor: its `Draft`, or the `Quantized` that came of it."""


@dataclass(frozen=True)
class Draft:
    """weight: what is to be stored, rows last; params: scales and zeros; values: the rounded weight."""

    weight: Tensor
    params: tuple[Tensor, ...] | None = None
    values: Tensor | None = None

    def chosen(self, fmt: Format) -> tuple[Tensor, ...]:
        """The scales and zeros, by the format's rule if nothing has chosen them."""
        return fmt.choose(self.weight) if self.params is None else self.params

    def rounded(self, fmt: Format) -> Tensor:
        """The values that will be decoded, float32."""
        if self.values is not None:
            return self.values
        return fmt.fake_quantize(self.weight, self.chosen(fmt))

    def quantized(self, fmt: Format) -> Quantized:
        """Codes. Values that an algorithm rounded are the format's own, so they are found again exactly."""
        return fmt.quantize(self.weight if self.values is None else self.values, self.chosen(fmt))

    def with_params(self, params: tuple[Tensor, ...]) -> Draft:
        """Other scales; values that were rounded under the old ones are forgotten."""
        return replace(self, params=params, values=None)


def rows_of(gm: GraphModule, node: Node, note: Note) -> Tensor | None:
    """The weight of an anchor as it is quantized, float32 [..., K]; None if it is not a parameter's."""
    operand = node.args[TARGETS[node.target][2]]
    if not isinstance(operand, Node):
        return None
    chain = expression(gm, operand)
    if chain is None:
        return None
    with torch.no_grad():
        weight = chain.apply(chain.parameter)
        if note.anchor in BATCHED:
            weight = weight.transpose(-2, -1)
        shape = rows_shape(note.anchor, operand)
        return weight.reshape(shape).to(torch.float32).contiguous()


def draft_of(gm: GraphModule, node: Node, note: Note) -> Draft | None:
    """The anchor's draft, or a fresh one from its weight."""
    found = node.meta.get(DRAFT)
    if isinstance(found, Draft):
        return found
    rows = rows_of(gm, node, note)
    return None if rows is None else Draft(rows)
