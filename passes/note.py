"""What a layer is to become: the record that `annotate` leaves at `node.meta["bitfold"]`.

In: a node of the graph.  Out: its `Note`, or None where the recipe wants nothing of it.

    %linear = aten.linear(%x, %w)    ->    %linear = aten.linear(%x, %w)    # int4[g128] weight, int8 input
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

KEY = "bitfold"


@dataclass(frozen=True)
class Note:
    """One anchor (a matmul, a convolution, an embedding) and the format of each of its edges, as text."""

    layer: str  # module path of the layer, or the path of a bare parameter
    anchor: str  # linear | conv1d | conv2d | embedding | bmm | grouped
    rule: str  # the recipe's rule that decided, as text
    weight: str | None = None
    input: str | None = None
    output: str | None = None
    observer: str | None = None  # how static ranges of input and output are found; None: anew in each call
    stored: str = ""  # the path under which the checkpoint's own codes are kept, if those are to be taken

    def __str__(self) -> str:
        edges = [
            f"{text}{' (stored)' if self.stored and name == 'weight' else ''} {name}"
            for name, text in (("weight", self.weight), ("input", self.input), ("output", self.output))
            if text
        ]
        if self.observer:
            edges.append(f"observed by {self.observer}")
        return ", ".join(edges)


def note(node: Node) -> Note | None:
    """The annotation of `node`, if it has one."""
    found = node.meta.get(KEY)
    return found if isinstance(found, Note) else None


def annotated(gm: GraphModule) -> Iterator[tuple[Node, Note]]:
    """Every annotated node with its note, in graph order; nodes may be added or erased meanwhile."""
    for node in list(gm.graph.nodes):
        found = note(node)
        if found is not None:
            yield node, found
