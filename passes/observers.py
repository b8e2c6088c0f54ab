"""Observers: small modules that return their input and remember the range of what went through.

In: tensors.  Out: the same tensors; `low` and `high`, from which a format's `from_range` makes static scales.

    minmax           the extremes of all batches
    average          the mean over batches of each batch's extremes: one odd batch does not decide
    percentile       the range that holds 99.9 % of all numbers; `percentile:99.99` for another share
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..formats import BitfoldError, Format, nearest


class Observer(nn.Module):
    """The range of everything that went through. `seen` is the number of batches."""

    is_observer = True

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        """x itself; its range is noted. What is empty is passed on and not counted."""
        if x.numel():
            self.note(x.detach())
            self.seen += 1
        return x

    def note(self, x: Tensor) -> None:
        """Take the numbers of one batch into account."""
        raise NotImplementedError

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest number expected, float32 scalars."""
        raise NotImplementedError

    def params(self, fmt: Format) -> tuple[Tensor, ...]:
        """Scale, and zero point where `fmt` has one, as scalars."""
        return fmt.from_range(*self.range())


class Given(Observer):
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


class Percentile(Observer):
    """The range that leaves out the same small share of numbers at either end.

    Counts fall into bins over [-reach, reach]; when a number lies outside, the reach doubles and each two
    bins become one, so that no batch is kept and their order hardly matters. Exact to one bin: reach /
    1024.
    """

    BINS = 2048

    def __init__(self, percent: float = 99.9) -> None:
        super().__init__()
        if not 50 < percent <= 100:
            raise BitfoldError(
                f"a percentile observer keeps more than 50 and at most 100 percent, not {percent}"
            )
        self.percent = percent
        self.reach = 0.0
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)

    def note(self, x: Tensor) -> None:
        numbers = x.float().flatten().cpu()
        largest = float(numbers.abs().max())
        if largest == 0.0:
            # Zero is the lower edge of the middle bin, whatever the reach.
            self.counts[self.BINS // 2] += numbers.numel()
            return
        if self.reach == 0.0:
            self.reach = largest
        while largest > self.reach:
            self._double()
        self.counts += torch.histc(numbers, self.BINS, -self.reach, self.reach)

    def _double(self) -> None:
        half = self.counts.reshape(-1, 2).sum(1)
        quarter = self.BINS // 4
        self.counts = torch.cat([torch.zeros(quarter), half, torch.zeros(quarter)]).double()
        self.reach *= 2

    def range(self) -> tuple[Tensor, Tensor]:
        if self.reach == 0.0:
            return torch.zeros(()), torch.zeros(())
        share = self.counts.cumsum(0) / self.counts.sum()
        outside = (1 - self.percent / 100) / 2
        edges = torch.linspace(-self.reach, self.reach, self.BINS + 1)
        # The first bin whose share passes the left-out part, and the last before the rest is left out.
        first = int((share <= outside).sum())
        last = int((share < 1 - outside).sum())
        return edges[min(first, self.BINS - 1)], edges[min(last, self.BINS - 1) + 1]


_KINDS: dict[str, type[Observer]] = {"minmax": MinMax, "average": Average, "percentile": Percentile}


def observer(text: str) -> Observer:
    """The observer that `text` names. Raises BitfoldError with the nearest names for an unknown one."""
    name, _, option = text.partition(":")
    if name not in _KINDS:
        raise BitfoldError(
            f"unknown observer {name!r}{nearest(name, _KINDS)}; observers are {', '.join(_KINDS)}"
        )
    if not option:
        return _KINDS[name]()
    if name != "percentile":
        raise BitfoldError(f"the observer {name} takes no option, and {text!r} gives it one")
    try:
        return Percentile(float(option))
    except ValueError as error:
        raise BitfoldError(f"{text!r}: a percentile is a number such as 99.9 ({error})") from error
