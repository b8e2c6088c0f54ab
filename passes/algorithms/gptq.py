"""GPTQ: round a weight column by column, and let the columns that are left make up for each error.

In: an annotated graph with statistics of the inputs. Out: drafts whose every number is decided.

    w = [0.4 0.4], inputs x1 = x2, scale 1:   nearest gives [0 0], error 0.8 x;  gptq [0 1], error 0.2 x

Frantar et al., "GPTQ", arXiv 2210.17323. With H the second moment of the inputs and U the upper Cholesky
factor of its inverse, rounding column j makes the error e = (w_j - q_j) / U_jj, and every later column k
takes e U_jk off (their equations 2 to 4; blocks of columns are brought up to date together, their section
3.3).

Scales are those of the draft (`clip` before this finds better ones) or of the format's own rule on the whole
weight: "static groups". With groups=sequential a group's scales are chosen when its first column comes, from
what the columns before have made of it, as in the paper. How a number is rounded under given scales is the
format's affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...formats import BitfoldError, Format
from ...formats.fit import Columns
from ..core import Miss
from .columns import column_device
from .draft import Draft
from .moments import inverse_factor
from .solve import Solver, Task

RoundColumn = Callable[[Tensor, int], Tensor]
"""(values [N, 1], column) -> the values that the format has for them."""


@dataclass(frozen=True)
class GPTQ(Solver):
    """actorder: columns of large inputs first; damping: share of H's mean diagonal that is added to it;
    block: columns that are brought up to date together (a matter of speed); groups: when scales are
    chosen."""

    name: ClassVar[str] = "gptq"
    needs_inputs: ClassVar[bool] = True
    decides: ClassVar[Literal["weights", "scales", "codes", ""]] = "codes"
    keeps_codes: ClassVar[bool] = False

    actorder: bool = True
    damping: float = 0.01
    block: int = 128
    groups: Literal["static", "sequential"] = "static"

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf or self.block < 1:
            raise BitfoldError(f"gptq takes damping above 0 and blocks of 1 or more columns, not {self}")
        if self.actorder and self.groups == "sequential":
            raise BitfoldError(
                "with actorder a group's columns come one here, one there, so its scales are chosen before: "
                "use groups=static, or actorder=false"
            )

    def falls_short(self, task: Task) -> Miss | None:
        f = task.format
        if self.groups == "static" or f.cols is None or f.cols == task.weight.shape[-1]:
            return None  # one group: its first column is the weight's
        static = "so groups are static"
        if task.draft.params is not None:
            return Miss(f"its scales are chosen already by what comes before, {static}")
        if not _by_groups(f):
            return Miss(f"scales of {f} depend on more than one group of one row, {static}")
        return None

    def solve(self, task: Task) -> Draft:
        f, w = task.format, task.weight
        if w.ndim != 2:
            raise BitfoldError(f"gptq rounds matrices, not a weight of {list(w.shape)}")
        order = torch.arange(w.shape[1], device=w.device)
        if self.actorder:
            order = task.moment.diagonal().argsort(descending=True, stable=True)
        factor = inverse_factor(task.moment[order][:, order], self.damping)
        if self.groups == "sequential" and task.draft.params is None and _by_groups(f):
            return self._sequential(f, w, factor)
        params, there = task.draft.chosen(f), column_device(w)
        columns = Columns(f, [part.to(there) for part in params], w.shape[0])
        values = compensate(w.to(there), factor.to(there), order.to(there), columns.round, self.block)
        return Draft(w, params, values.to(w.device))

    def _sequential(self, f: Format, w: Tensor, factor: Tensor) -> Draft:
        """Scales of a group from the weight as it is when the group's first column comes."""
        cols, found = f.cols, list(f.choose(w))
        assert cols is not None
        left = w.clone()
        pieces = []
        for start in range(0, w.shape[1], cols):
            group = slice(start, start + cols)
            for part, new in zip(found, f.choose(left[:, group].contiguous()), strict=True):
                part[:, start // cols : start // cols + 1] = new
            columns = Columns(f, tuple(found), w.shape[0])

            def rounded(values: Tensor, j: int, columns: Columns = columns, start: int = start) -> Tensor:
                return columns.round(values, start + j)

            order = torch.arange(cols, device=w.device)
            values = compensate(left[:, group], factor[group, group], order, rounded, self.block)
            errors = torch.linalg.solve_triangular(
                factor[group, group], left[:, group] - values, upper=True, left=False
            )
            left[:, start + cols :] -= errors @ factor[group, start + cols :]
            pieces.append(values)
        return Draft(w, tuple(found), torch.cat(pieces, 1))


def compensate(
    weight: Tensor, factor: Tensor, order: Tensor, round_column: RoundColumn, block: int = 128
) -> Tensor:
    """The rounded weight [N, K]. `factor`: of the moment with its rows and columns in `order`."""
    left = weight[:, order].clone()
    out = torch.empty_like(left)
    places = order.tolist()
    for start in range(0, left.shape[1], block):
        stop = min(start + block, left.shape[1])
        here, inner = left[:, start:stop].clone(), factor[start:stop, start:stop]
        steps = inner.diagonal().clone()
        errors = torch.empty_like(here)
        for i in range(stop - start):
            column = here[:, i : i + 1]
            rounded = round_column(column, places[start + i])
            out[:, start + i : start + i + 1] = rounded
            error = (column - rounded) / steps[i]
            errors[:, i : i + 1] = error
            here[:, i + 1 :].addmm_(error, inner[i : i + 1, i + 1 :], alpha=-1)
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    back = torch.empty_like(out)
    back[:, order] = out
    return back


def _by_groups(f: Format) -> bool:
    """Whether each group of a row has scales of its own, that depend on nothing else."""
    if f.scale is None or f.scale.two_level or f.cols is None:
        return False
    return f.scale.granularity.rows == 1
