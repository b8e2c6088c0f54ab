"""Refit: given the codes, the scales with the least output error.

In: a graph whose drafts have values (after gptq or learned rounding) and statistics of the inputs. Out: the
same codes under other scales, where that lowers the error.

    codes [1 2], w = [1.2 2.2], scale 1:   the least-squares scale is (1.2 * 1 + 2.2 * 2) / (1 + 4) = 1.12

With codes fixed, the error (s C - w) H (s C - w)^T of a row is quadratic in the scales s of its groups: a
linear system of as many unknowns as the row has groups, as in the alternating updates of AQLM (Egiazarian et
al., arXiv 2401.06118, section 3.3), here for scales. A row keeps its old scales if, after rounding to how
scales are stored, the error is no less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...formats import BitfoldError
from ...formats.fit import multipliers, with_multipliers
from ..core import Miss
from .draft import Draft
from .moments import damped, row_error
from .solve import Solver, Task

_AT_ONCE = 1 << 24
"""Numbers of the rows' matrices that are there at a time: 64 MiB."""


@dataclass(frozen=True)
class Refit(Solver):
    """damping: share of the moment's mean diagonal that is added to it."""

    name: ClassVar[str] = "refit"
    needs_inputs: ClassVar[bool] = True
    decides: ClassVar[Literal["weights", "scales", "codes", ""]] = "codes"
    wants_codes: ClassVar[bool] = True

    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.damping < math.inf:
            raise BitfoldError(f"refit takes damping of 0 or more, not {self}")

    def falls_short(self, task: Task) -> Miss | None:
        scale = task.format.scale
        assert scale is not None
        if scale.zero != "none":
            return Miss(f"{task.format} has zero points, beside which scales alone are not fitted; they stay")
        if scale.granularity.rows != 1:
            return Miss(f"{task.format} has scales that several rows share; they stay")
        return None

    def solve(self, task: Task) -> Draft:
        f, draft = task.format, task.draft
        if self.falls_short(task) is not None:
            return draft
        assert f.scale is not None
        grain = f.scale.granularity
        if draft.values is None:
            raise BitfoldError("refit wants codes that are decided; put gptq before it")
        params = draft.chosen(f)
        old = multipliers(f, params)
        groups = old.shape[-1]
        codes = grain.split(draft.values).reshape(*old.shape, -1) / torch.where(old == 0, 1.0, old)[..., None]
        h = damped(task.moment, self.damping)
        wanted = least_squares(task.weight, codes.flatten(1), h, groups)
        # A scale that changes its sign or vanishes would change what the codes mean.
        wanted = torch.where(wanted * old > 0, wanted, old)
        fitted = with_multipliers(f, params, wanted)
        values = (codes * multipliers(f, fitted)[..., None]).reshape(task.weight.shape)
        better = row_error(values - task.weight, h) < row_error(draft.values - task.weight, h)
        scales = torch.where(better[:, None], fitted[0], params[0])
        return Draft(task.weight, (scales, *params[1:]), torch.where(better[:, None], values, draft.values))


def least_squares(weight: Tensor, codes: Tensor, h: Tensor, groups: int) -> Tensor:
    """The multiplier of each group of each row, [N, groups]; some rows at a time, since each has a matrix."""
    rows = max(1, _AT_ONCE // groups**2)
    pieces = zip(torch.split(weight, rows), torch.split(codes, rows), strict=True)
    return torch.cat([_solved(w, c, h, groups) for w, c in pieces])


def _solved(weight: Tensor, codes: Tensor, h: Tensor, groups: int) -> Tensor:
    rows, k = weight.shape
    normal = weight.new_empty(rows, groups, groups)
    width = k // groups
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        normal[:, g] = ((codes[:, part] @ h[part]) * codes).reshape(rows, groups, width).sum(-1)
    right = ((weight @ h) * codes).reshape(rows, groups, width).sum(-1)
    # A group whose codes are all zero has nothing to say about its scale.
    empty = normal.diagonal(dim1=-2, dim2=-1) <= 0
    normal.diagonal(dim1=-2, dim2=-1).add_(empty.to(normal.dtype))
    solved, failed = torch.linalg.solve_ex(normal, right[..., None])
    return torch.where((failed != 0)[:, None], 0.0, solved[..., 0])
