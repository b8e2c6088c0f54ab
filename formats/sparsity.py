"""Which numbers of a row are stored at all.

In: a dense tensor [..., K]. Out: the kept numbers [..., K * n / m] and where they were, packed 2 bits each.

    NofM(2, 4):  [5 0 -7 1]  ->  kept [5 -7], indices [0, 2] in one nibble  ->  expand: [5 0 -7 0]

The canonical form keeps the largest magnitudes of each run of m; of equals, the first.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import FormatError
from .granularity import Granularity
from .layout import Packed

_TEXT = re.compile(r"(\d+):(\d+)")


class Sparsity(ABC):
    """`Dense` or `NofM`."""

    @abstractmethod
    def check(self, shape: Sequence[int]) -> None:
        """FormatError if a tensor of this shape cannot be made sparse so."""

    @abstractmethod
    def mask(self, x: Tensor) -> Tensor:
        """bool, True where a number of x is kept."""

    @abstractmethod
    def compress(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(kept numbers, packed indices or None)."""

    @abstractmethod
    def expand(self, kept: Tensor, indices: Tensor | None) -> Tensor:
        """The dense tensor, zero where nothing was kept."""

    @abstractmethod
    def kept(self, length: int) -> int:
        """How many numbers of a row of `length` are stored."""

    @abstractmethod
    def narrowed(self, granularity: Granularity) -> Granularity:
        """The granularity of the kept numbers."""

    @property
    def index_bits(self) -> float:
        """Bits of metadata for each number of the dense tensor."""
        return 0.0


@dataclass(frozen=True)
class Dense(Sparsity):
    """Everything is stored."""

    def check(self, shape: Sequence[int]) -> None:
        return None

    def mask(self, x: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=torch.bool)

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x, None

    def expand(self, kept: Tensor, indices: Tensor | None) -> Tensor:
        return kept

    def kept(self, length: int) -> int:
        return length

    def narrowed(self, granularity: Granularity) -> Granularity:
        return granularity

    def __str__(self) -> str:
        return "dense"


@dataclass(frozen=True)
class NofM(Sparsity):
    """n of every m neighbours in a row are stored, each with an index of log2(m) bits."""

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if self.m not in (2, 4, 8, 16) or not 1 <= self.n < self.m:
            raise FormatError(
                f"n:m sparsity keeps 1 to m-1 of m = 2, 4, 8 or 16 numbers, not {self.n}:{self.m}"
            )

    @classmethod
    def parse(cls, text: str) -> NofM | None:
        """The sparsity that `text` such as '2:4' spells, or None."""
        found = _TEXT.fullmatch(text)
        return cls(int(found[1]), int(found[2])) if found else None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def _width(self) -> int:
        return (self.m - 1).bit_length()

    @property
    def index_bits(self) -> float:
        return self._width * self.n / self.m

    def check(self, shape: Sequence[int]) -> None:
        if shape[-1] % self.m != 0:
            raise FormatError(
                f"{self} sparsity needs a last dimension that {self.m} divides, not {shape[-1]}"
            )

    def kept(self, length: int) -> int:
        return length * self.n // self.m

    def narrowed(self, granularity: Granularity) -> Granularity:
        return granularity.narrowed(self.n, self.m)

    def mask(self, x: Tensor) -> Tensor:
        runs = x.reshape(*x.shape[:-1], x.shape[-1] // self.m, self.m)
        return self._mask(runs).reshape(x.shape)

    def _mask(self, runs: Tensor) -> Tensor:
        size = runs.abs().nan_to_num(nan=math.inf, posinf=math.inf)  # a NaN must be kept, to be seen
        # rank = how many are larger, or equal and earlier: m compares, no sort, same on every device
        columns = []
        for i in range(self.m):
            rank = torch.zeros_like(size[..., 0], dtype=torch.int8)
            for j in range(self.m):
                if j != i:
                    before = size[..., j] >= size[..., i] if j < i else size[..., j] > size[..., i]
                    rank = rank + before
            columns.append(rank < self.n)
        return torch.stack(columns, -1)

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self.check(x.shape)
        runs = x.reshape(*x.shape[:-1], x.shape[-1] // self.m, self.m)
        mask = self._mask(runs)
        slot = mask.cumsum(-1) - 1
        place = torch.arange(self.m, device=x.device)
        index = torch.stack([((slot == t) & mask).mul(place).sum(-1) for t in range(self.n)], -1)
        kept = runs.gather(-1, index)
        flat = (*x.shape[:-1], self.kept(x.shape[-1]))
        return kept.reshape(flat), Packed().pack(index.to(torch.uint8).reshape(flat), self._width)

    def expand(self, kept: Tensor, indices: Tensor | None) -> Tensor:
        assert indices is not None
        length = kept.shape[-1]
        index = Packed().unpack(indices, length, self._width).to(torch.int64)
        runs = kept.reshape(*kept.shape[:-1], length // self.n, self.n)
        index = index.reshape(runs.shape)
        dense = runs.new_zeros((*runs.shape[:-1], self.m)).scatter(-1, index, runs)
        return dense.reshape(*kept.shape[:-1], length // self.n * self.m)


def parse(text: str) -> Sparsity | None:
    """The sparsity that `text` spells, or None."""
    return Dense() if text == "dense" else NofM.parse(text)
