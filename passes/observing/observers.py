"""Observers: small modules that return their input and remember the range of what went through.

In: tensors.  Out: the same tensors; a range, from which a format's `from_range` makes static scales.

    minmax           the extremes of all batches
    average          the mean over batches of each batch's extremes: one odd batch does not decide
    moving           an exponential moving average of them; `moving:0.01` moves a hundredth of the way

Those that keep a histogram are in `histograms.py`; `kinds.py` knows all of them by name. A range is of
numbers: NaN and infinity are refused when they come, not made a scale.
"""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...formats import BitfoldError, Format


class Observer(nn.Module):
    """The range of everything that went through. `seen` is the number of batches; `at` says where it stands
    in the model."""

    is_observer = True
    number: ClassVar[str] = ""
    """What the number behind its name is (`moving:0.01`), for kinds that take one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.at = "what is observed"

    def forward(self, x: Tensor) -> Tensor:
        """x itself; its range is noted. What is empty is passed on and not counted. Raises BitfoldError for
        NaN and infinity."""
        if x.numel():
            if not finite(x):
                raise BitfoldError(
                    f"NaN or infinity comes to {self.at}, and has no range; look at the batch, or let a rule "
                    "of the recipe skip the layer"
                )
            self.note(x.detach())
            self.seen += 1
        return x

    def note(self, x: Tensor) -> None:
        """Take the numbers of one batch into account."""
        raise NotImplementedError

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest number expected, float32 scalars."""
        raise NotImplementedError

    def ends(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """The range to be held in `fmt`: what was seen, or less of it."""
        del fmt
        return self.range()

    def params(self, fmt: Format) -> tuple[Tensor, ...]:
        """Scale, and zero point where `fmt` has one, as scalars."""
        return fmt.from_range(*self._checked(fmt))

    def _checked(self, fmt: Format) -> tuple[Tensor, Tensor]:
        """The ends, if they are a range. Raises BitfoldError, naming the observer, for what is none."""
        low, high = (torch.as_tensor(end, dtype=torch.float32) for end in self.ends(fmt))
        ordered = low.numel() == high.numel() == 1 and -math.inf < float(low) <= float(high) < math.inf
        # What stands there before training has seen anything.
        unseen = low.numel() == high.numel() == 1 and float(low) == math.inf and float(high) == -math.inf
        if self.seen and not ordered and not unseen:
            raise BitfoldError(
                f"the observer {type(self).__name__} gives {self.at} the range {low.tolist()} to "
                f"{high.tolist()}; a range is two finite numbers, the lower one first"
            )
        return low, high


def finite(x: Tensor) -> bool:
    """Whether all are numbers. aminmax reads x once and carries NaN through; isfinite would write a mask."""
    low, high = torch.aminmax(x.detach())
    return math.isfinite(low) and math.isfinite(high)


class Agreed(Observer):
    """One of several edges that have one scale: the range is the one that holds all of theirs.

    Each still sees its own numbers, in the observer that it had; `others` are those of all of them.
    """

    def __init__(self, own: Observer, others: list[Observer]) -> None:
        super().__init__()
        # Not submodules: the graph holds each of them once, under its own edge.
        self.__dict__["own"], self.__dict__["others"] = own, others
        self.at = own.at

    def note(self, x: Tensor) -> None:
        own: Observer = self.__dict__["own"]
        own(x)

    def ends(self, fmt: Format) -> tuple[Tensor, Tensor]:
        others: list[Observer] = self.__dict__["others"]
        ranged = [other for other in others if other.seen and not isinstance(other, FixedRange)]
        lows, highs = zip(*(other.ends(fmt) for other in ranged), strict=True)
        return torch.stack(lows).amin(), torch.stack(highs).amax()

    def params(self, fmt: Format) -> tuple[Tensor, ...]:
        """As its own kind makes them, which may be no matter of the ends alone (powers of two, say)."""
        own: Observer = self.__dict__["own"]
        at_ends = copy.copy(own)  # whose `ends` are the agreed ones
        at_ends.__dict__.update(ends=self.ends, range=lambda: self.ends(fmt))
        return at_ends.params(fmt)


class FixedRange(Observer):
    """A scale (and a zero point) that came with a checkpoint: taken as it is, whatever goes through."""

    def __init__(self, params: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.seen = 1
        self.given = tuple(part.reshape(()) for part in params)

    def note(self, x: Tensor) -> None:
        del x

    def params(self, fmt: Format) -> tuple[Tensor, ...]:
        return self.given


class MinMax(Observer):
    """The extremes of all batches."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def note(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self.low = torch.minimum(self.low, low.float().cpu())
        self.high = torch.maximum(self.high, high.float().cpu())

    def range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class Average(Observer):
    """The mean, over batches, of each batch's extremes."""

    def __init__(self) -> None:
        super().__init__()
        self.lows, self.highs = torch.zeros(()), torch.zeros(())

    def note(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self.lows = self.lows + low.float().cpu()
        self.highs = self.highs + high.float().cpu()

    def range(self) -> tuple[Tensor, Tensor]:
        return self.lows / self.seen, self.highs / self.seen


class Moving(Observer):
    """An exponential moving average of each batch's extremes: later batches count more.

    The first batch begins it; each later one moves it by `share` of the way (torch.ao's
    MovingAverageMinMaxObserver, whose default is 0.01, for thousands of batches of training; calibration has
    a few dozen).
    """

    number = "a share is a number such as 0.1"

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise BitfoldError(f"a moving observer takes a share above 0 and at most 1, not {share}")
        self.share = share
        self.low, self.high = torch.zeros(()), torch.zeros(())

    def note(self, x: Tensor) -> None:
        low, high = (end.float().cpu() for end in torch.aminmax(x))
        step = self.share if self.seen else 1.0
        self.low, self.high = self.low + step * (low - self.low), self.high + step * (high - self.high)

    def range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high
