"""Which numbers share a scale: tensor, row, group of a row, or 2-D block.

In: a tensor [..., K]. Out: a view with the sharing numbers on their own axes, and scales that broadcast.

    Granularity(1, 32):  x [N, K] -> split: [N, K/32, 32], scales [N, K/32], spread: [N, K/32, 1]

A row is a channel of a weight [N, K] and a token of an activation [..., K].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import FormatError

_TEXT = re.compile(r"g([1-9]\d*)|([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True)
class Granularity:
    """A block of `rows` x `cols` numbers shares a scale; None is the whole extent."""

    rows: int | None = 1
    cols: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows != 1 and self.cols is None:
            raise FormatError(f"a block of {self.rows} rows needs a width too, such as {self.rows}x128")
        if self.rows is None and self.cols is not None:
            raise FormatError(f"a block of {self.cols} columns needs a height too, such as 128x{self.cols}")
        if (self.rows or 1) < 1 or (self.cols or 1) < 1:
            raise FormatError(f"a block has at least one row and one column, not {self.rows}x{self.cols}")

    @classmethod
    def parse(cls, text: str) -> Granularity | None:
        """The granularity that `text` spells, or None if it spells none."""
        if text == "tensor":
            return cls(None, None)
        if text == "row":
            return cls(1, None)
        found = _TEXT.fullmatch(text)
        if found is None:
            return None
        group, rows, cols = found.groups()
        return cls(1, int(group)) if group else cls(int(rows), int(cols))

    def __str__(self) -> str:
        if self.cols is None:
            return "tensor" if self.rows is None else "row"
        return f"g{self.cols}" if self.rows == 1 else f"{self.rows}x{self.cols}"

    @property
    def is_block(self) -> bool:
        return self.rows is not None and self.rows > 1

    def check(self, shape: Sequence[int]) -> None:
        """Raises FormatError, naming what would fit, if a tensor of this shape cannot be divided so."""
        if len(shape) == 0:
            raise FormatError("a tensor without dimensions has no row to quantize; give it at least one")
        if self.is_block and len(shape) != 2:
            raise FormatError(f"blocks of {self} are for 2-D weights, not for shape {tuple(shape)}")
        if self.is_block and shape[0] % (self.rows or 1) != 0:
            raise FormatError(
                f"{self.rows} rows a block do not divide the {shape[0]} rows of shape {tuple(shape)};"
                f" these do: {_divisors(shape[0])}"
            )
        if self.cols is not None and shape[-1] % self.cols != 0:
            raise FormatError(
                f"a group of {self.cols} does not divide the last dimension {shape[-1]} of shape"
                f" {tuple(shape)}; these do: {_divisors(shape[-1])}"
            )

    def narrowed(self, kept: int, of: int) -> Granularity:
        """The granularity of what is left when sparsity keeps `kept` of every `of` numbers of a row."""
        if self.cols is None:
            return self
        if self.cols % of != 0:
            raise FormatError(f"with {kept}:{of} sparsity a group is a multiple of {of}, not {self.cols}")
        return Granularity(self.rows, self.cols * kept // of)

    def scales_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of `shape`."""
        if self.rows is None:
            return (1,) * len(shape)
        if self.cols is None:
            return (*shape[:-1], 1)
        rows = (shape[0] // self.rows,) if self.is_block else tuple(shape[:-1])
        return (*rows, shape[-1] // self.cols)

    def split(self, x: Tensor) -> Tensor:
        """x with each block on its own axes; only `spread` scales broadcast against it."""
        if self.cols is None:
            return x
        groups = x.shape[-1] // self.cols
        if self.rows == 1:
            return x.reshape(*x.shape[:-1], groups, self.cols)
        assert self.rows is not None
        return x.reshape(x.shape[0] // self.rows, self.rows, groups, self.cols)

    def spread(self, scales: Tensor) -> Tensor:
        """Scales shaped to broadcast against `split(x)`."""
        if self.cols is None:
            return scales
        return scales.unsqueeze(-1) if self.rows == 1 else scales[:, None, :, None]

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest number of each block, in the scales' shape; zeros for an empty block."""
        if self._empty(x):
            zeros = x.new_zeros(self.scales_shape(x.shape))
            return zeros, zeros
        view, dims, keep = self._reduction(x)
        return view.amin(dims, keepdim=keep), view.amax(dims, keepdim=keep)

    def amax(self, x: Tensor) -> Tensor:
        """Largest magnitude of each block; NaN if there is one."""
        if self._empty(x):
            return x.new_zeros(self.scales_shape(x.shape))
        view, dims, keep = self._reduction(x)
        if x.is_cuda:
            return view.abs().amax(dims, keepdim=keep)
        # Two reductions without a temporary are three times faster on a CPU than abs() and one.
        return torch.maximum(-view.amin(dims, keepdim=keep), view.amax(dims, keepdim=keep))

    def means(self, x: Tensor) -> Tensor:
        """Mean of each block."""
        if self._empty(x):
            return x.new_zeros(self.scales_shape(x.shape))
        view, dims, keep = self._reduction(x)
        return view.mean(dims, keepdim=keep)

    def _reduction(self, x: Tensor) -> tuple[Tensor, list[int], bool]:
        view = self.split(x)
        if self.rows is None:
            return view, list(range(x.ndim)), True
        if self.cols is None:
            return view, [-1], True
        return view, ([-1] if self.rows == 1 else [1, 3]), False

    def _empty(self, x: Tensor) -> bool:
        # Reductions over nothing raise. A symbolic size is never zero: export specializes 0 and 1.
        count = x.shape[-1] if self.rows is not None else x.numel()
        return isinstance(count, int) and count == 0


def _divisors(n: int) -> str:
    n = int(n)
    fitting = [d for d in range(1, n + 1) if n % d == 0] or [1]
    useful = [d for d in fitting if d >= 16] or fitting
    return ", ".join(str(d) for d in useful[:8])
