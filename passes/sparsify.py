"""Sparsify: prune annotated weights to n of every m by magnitude.

In: an annotated graph. Out: the same graph, the sparsity written into the format of each weight that can
take it; `fake_quantize` then trains under the mask, and `fold` stores only what is kept, with its indices.

    %y = aten.linear(%x, %w)  # int4[g128] weight   ->   # int4[g128,2:4] weight

A sparsity is part of a format, so a layer whose weight has no format is reported, and so is one whose sizes
do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import GraphModule, Node

from ..formats import BitfoldError, Format, FormatError, format
from ..formats.sparsity import NofM
from .anchors import TARGETS, rows_shape
from .core import Miss, Pass, report
from .note import KEY, Note, annotated
from .stages import Stage


@dataclass(frozen=True)
class Sparsify(Pass):
    """pattern: how many of how many neighbours in a row are kept, as in `2:4`."""

    name: ClassVar[str] = "sparsify"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.annotated,)
    produces: ClassVar[Stage | None] = Stage.annotated

    pattern: str = "2:4"

    def __post_init__(self) -> None:
        if NofM.parse(self.pattern) is None:
            raise BitfoldError(f"a sparsity pattern is n:m as in 2:4, not {self.pattern!r}")

    def apply(self, gm: GraphModule) -> int:
        """Number of weights marked."""
        marked = 0
        for node, note in annotated(gm):
            new = self._sparse(node, note)
            if isinstance(new, Miss):
                report(gm, node, new, asked=f"sparsity {self.pattern}")
                continue
            node.meta[KEY] = replace(note, weight=str(new), stored="")
            marked += 1
        return marked

    def _sparse(self, node: Node, note: Note) -> Format | Miss:
        """The weight's format with the sparsity in it, or why not."""
        if not note.weight:
            return Miss("its weight has no format for the sparsity to be part of")
        if note.anchor == "embedding":
            return Miss("a row of an embedding is read, not reduced over, so pruning it saves no work")
        if note.stored:
            return Miss("its codes come from the checkpoint and are taken as they are")
        pattern = NofM.parse(self.pattern)
        assert pattern is not None
        weight = node.args[TARGETS[node.target][2]]
        assert isinstance(weight, Node)
        try:
            sparse = replace(format(note.weight), sparsity=pattern)
            sparse.check(rows_shape(note.anchor, weight))
        except FormatError as error:
            return Miss(str(error))
        return sparse
