"""What is known of a parameter that became codes, and of the graph that reads them.

In: decoded rows of codes. Out: the parameter, in its own shape.

    FoldedWeight("weight", (64, 3, 3, 3), .., back=(("reshape", (64, 3, 3, 3)),)).restore(rows [64, 27])
    ->  [64, 3, 3, 3]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats import BitfoldError

Steps = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Canonical:
    """What a file says of a folded module: its folded graph as data, what each attribute is called in the
    module, and the numbers of dimensions that its inputs must have (None for any).
    """

    graph: dict[str, Any]
    names: dict[str, str]
    ranks: tuple[int, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Canonical:
        # Never written to, and as large for each copy as the graph's text.
        return self


@dataclass(frozen=True)
class FoldedWeight:
    """One parameter that became codes.

    `path` is the parameter's first path in the model, `format` that of the parts as they lie here,
    `canonical` the same in the layout that files have. `back` leads from the decoded rows to the parameter by
    ("columns", places), ("permute", dims), ("reshape", shape) and ("hadamard", ()) steps; None if the rows
    are only a slice of it.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    format: str
    canonical: str
    k: int
    parts: tuple[str, ...]
    back: Steps | None = ()

    def restore(self, rows: Tensor) -> Tensor:
        """The parameter in its own shape, from the decoded rows."""
        if self.back is None:
            raise BitfoldError(
                f"{self.name!r} was folded through a slice of it, so it cannot be decoded as a whole"
            )
        for step, sizes in self.back:
            if step == "columns":
                rows = rows[..., torch.tensor(sizes, device=rows.device)]
            elif step == "hadamard":
                rows = torch.ops.bitfold.hadamard(rows, True)
            else:
                rows = rows.permute(sizes) if step == "permute" else rows.reshape(sizes)
        return rows
