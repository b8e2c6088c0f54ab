"""What a gradient estimator is: how a gradient comes back through a rounding, and what is learned of scales.

In: what was rounded, under which scales, and the gradient of what came out (`Back`). Out: gradients of the
numbers and of what is learned; for a kernel that does the same in one pass, lines of Triton.

    class Half(Estimator):                  bf.register_estimator(Half()), then bf.Qat(weight="half")
        name = "half"
        def for_x(self, back): return back.flow / 2

Numbers, and what is made of them, are float32 in the blocks of `Granularity.split`, so that a scale stands
beside all numbers that share it; whoever calls brings them back into shape, and sums over a block.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import learned
from ..errors import FormatError
from ..format import Format
from ..sparsity import Dense


@dataclass(frozen=True)
class Back:
    """One rounding on the way back. x: the numbers [..., K]; scales: as they are stored; held: what is
    learned; gradient: of the rounded x; number: the estimator's own; item: whether x is a batch of items."""

    format: Format
    x: Tensor
    scales: tuple[Tensor, ...]
    held: Sequence[Tensor]
    gradient: Tensor
    number: float | None = None
    item: bool = False

    @cached_property
    def _units(self) -> tuple[Tensor, Tensor, Tensor]:
        return learned.units(self.format, self.x, self.scales)

    @property
    def u(self) -> Tensor:
        """The numbers in units of the element: codes before they are rounded."""
        return self._units[0]

    @property
    def step(self) -> Tensor:
        """The value of one unit; never 0."""
        return self._units[1]

    @property
    def low(self) -> Tensor:
        """The value of the smallest code, for formats with a zero point; else 0."""
        return self._units[2]

    @cached_property
    def flow(self) -> Tensor:
        """The gradient of what came out."""
        return learned.grain_of(self.format).split(self.gradient.to(torch.float32))

    @cached_property
    def numbers(self) -> Tensor:
        """What went in."""
        return learned.grain_of(self.format).split(self.x.to(torch.float32))

    @cached_property
    def value(self) -> Tensor:
        """What came out, without a gradient of its own."""
        with torch.no_grad():
            rounded = self.format.fake_quantize(self.x.to(torch.float32), self.scales or None)
            return learned.grain_of(self.format).split(rounded)

    @cached_property
    def below(self) -> Tensor:
        """Where a number is the smallest value or less."""
        return self.u <= self.format.element.low

    @cached_property
    def above(self) -> Tensor:
        """Where a number is the largest value or more."""
        return self.u >= self.format.element.high


@dataclass(frozen=True)
class Kernel:
    """A backward pass in Triton. for_x: an expression, the gradient of the numbers; for_held: one for each
    number that is learned, whose sum over a block is taken; lines: what stands before.

    They read `v` (the numbers), `g` (the gradient of what came out), `u`, `value` and `safe` (the step, never
    0) as `Back` has them, [blocks, numbers] each; `step` [blocks], as it is stored; `least` [blocks, 1], the
    value of the smallest code, if the format has a zero point. Divide by `tl.div_rn`, as torch does. Names of
    two letters or more are free but for these, `at`, `keep`, `back`, `bits` and the arguments'.
    """

    for_x: str
    for_held: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


class Estimator(ABC):
    """name: how a gradient's text spells it. learns: names of the parameters that take the place of scales,
    each a word. number: what `name:number` stands for if the text has no number; None: it takes none.
    identity: the gradient of x is that of what came out, so that nothing is kept for it and `for_x` is not
    called; for classes that derive from `Straight`. by_item: what is
    learned of an activation counts the numbers of one item of its batch (`Back.item`)."""

    name: ClassVar[str]
    learns: ClassVar[tuple[str, ...]] = ()
    number: ClassVar[float | None] = None
    identity: ClassVar[bool] = False
    by_item: ClassVar[bool] = False

    def check_number(self, number: float) -> None:
        """Raises FormatError for a number that it cannot take."""
        if not math.isfinite(number):
            raise FormatError(f"the number of {self.name} is finite, not {number}")

    def check(self, fmt: Format) -> None:
        """Raises FormatError, one sentence, for a format that cannot be trained so."""
        if not self.learns:
            return
        if fmt.scale is None:
            raise FormatError(f"{fmt} has no scale to learn; take the gradient 'straight' or 'clip'")
        if not isinstance(fmt.sparsity, Dense):
            raise FormatError(f"scales of the sparse format {fmt} are not learned; take 'straight' or 'clip'")

    def names(self, fmt: Format) -> tuple[str, ...]:
        """Of `learns`, what there is for this format."""
        return self.learns

    def start(self, fmt: Format, scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What is learned, float32, as it begins at stored scales: by default the steps, and the smallest
        values of formats with a zero point."""
        return learned.learned(fmt, scales)

    def begin(self, fmt: Format, scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`start`, for callers. Raises FormatError if it is not one for each of `names`."""
        begun, names = tuple(self.start(fmt, scales)), self.names(fmt)
        if len(begun) != len(names):
            raise FormatError(
                f"{self.name} learns {', '.join(names) or 'nothing'} of {fmt}, and its start() gives "
                f"{len(begun)} tensor(s); give one for each"
            )
        return begun

    def scales(self, fmt: Format, held: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The stored scales that what is learned stands for."""
        return learned.stored(fmt, held)

    @abstractmethod
    def for_x(self, back: Back) -> Tensor:
        """The gradient of the numbers."""

    def for_held(self, back: Back) -> tuple[Tensor, ...]:
        """For each of `names`, what each number adds to its gradient."""
        return ()

    def factor(self, back: Back) -> Any:
        """What the sums of `for_held` are multiplied by: a number (or a symbol of sizes), or None for 1."""
        return None

    def kernel(self, fmt: Format, number: float | None) -> Kernel | None:
        """`for_x` and `for_held` in Triton; None: a compiler fuses them into what stands around."""
        return None
