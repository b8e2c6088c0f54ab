"""Observers that count: where the numbers lie, and the range that a format then keeps most of.

In: tensors. Out: the same tensors, counts in 2048 bins, and a range, chosen when the format is known.

    percentile   the range that holds 99.9 % of all numbers; `percentile:99.99` for another share
    mse          the range under which the format's own rounding of the numbers has the least squared error
    entropy      the range under which the rounded numbers' distribution is nearest to that of the numbers

`mse` and `entropy` try ranges from the whole down to a hundredth of it, both ends alike for a symmetric
format and each on its own for one with a zero point. What is measured is the format's own arithmetic, so it
holds for integers and floats of any width. Sources: least squares, Shin et al. 2016 (arXiv 1512.01322) and
torch.ao's HistogramObserver; entropy, S. Migacz, 8-bit Inference with TensorRT, GTC 2017.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...formats import BitfoldError, Format
from .observers import Observer


class Histogram(Observer):
    """Counts in bins over [-reach, reach].

    When a number lies outside, the reach doubles and each two bins become one, so that no batch is kept and
    their order hardly matters. Exact to one bin: reach / 1024.
    """

    BINS = 2048

    def __init__(self) -> None:
        super().__init__()
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
        if self.reach > torch.finfo(torch.float32).max:  # a mask of float32's least number, say
            numbers = numbers.double()
        self.counts += torch.histc(numbers, self.BINS, -self.reach, self.reach)

    def _double(self) -> None:
        half = self.counts.reshape(-1, 2).sum(1)
        quarter = self.BINS // 4
        self.counts = torch.cat([torch.zeros(quarter), half, torch.zeros(quarter)]).double()
        self.reach *= 2

    def range(self) -> tuple[Tensor, Tensor]:
        """The outer edges of the outermost bins that hold a number."""
        held = self.counts.nonzero().flatten()
        if self.reach == 0.0 or not held.numel():
            return torch.zeros(()), torch.zeros(())
        edges = self.edges
        return edges[held[0]], edges[held[-1] + 1]

    @property
    def edges(self) -> Tensor:
        """Of the bins, [BINS + 1]."""
        ends = torch.finfo(torch.float32)
        edges = torch.linspace(-self.reach, self.reach, self.BINS + 1, dtype=torch.float64)
        return edges.clamp(ends.min, ends.max).float()

    @property
    def centres(self) -> Tensor:
        """Of the bins, [BINS]; where no number but zero was seen, they are zero."""
        return (self.edges[1:] + self.edges[:-1]) / 2


class Percentile(Histogram):
    """The range that leaves out the same small share of numbers at either end."""

    number = "a percentile is a number such as 99.9"

    def __init__(self, percent: float = 99.9) -> None:
        super().__init__()
        if not 50 < percent <= 100:
            raise BitfoldError(
                f"a percentile observer keeps more than 50 and at most 100 percent, not {percent}"
            )
        self.percent = percent

    def range(self) -> tuple[Tensor, Tensor]:
        if self.reach == 0.0:
            return torch.zeros(()), torch.zeros(())
        share = self.counts.cumsum(0) / self.counts.sum()
        outside = (1 - self.percent / 100) / 2
        edges = self.edges
        # The first bin whose share passes the left-out part, and the last before the rest is left out.
        first = int((share <= outside).sum())
        last = int((share < 1 - outside).sum())
        return edges[min(first, self.BINS - 1)], edges[min(last, self.BINS - 1) + 1]


class _Searched(Histogram):
    """The range of least loss, of all that are tried."""

    STEPS = 100

    def ends(self, fmt: Format) -> tuple[Tensor, Tensor]:
        low, high = self.range()
        best, least = (low, high), torch.inf
        if self.reach:
            rows = self.centres.reshape(1, -1)
            for ends in self._tried(low, high, fmt):
                chosen = tuple(part.reshape(1, 1) for part in fmt.from_range(*ends))
                rounded = fmt.fake_quantize(rows, chosen).flatten()
                inside = (self.centres >= ends[0]) & (self.centres <= ends[1])
                loss = self.loss(rounded, inside)
                if loss < least:
                    best, least = ends, loss
        return best

    def loss(self, rounded: Tensor, inside: Tensor) -> float:
        """What is lost if each bin's numbers become `rounded` [BINS]; `inside`: the bins in the range."""
        raise NotImplementedError

    def _tried(self, low: Tensor, high: Tensor, fmt: Format) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole range first, then smaller ones; of two ends of their own, every pair of twenty each."""
        shares = [1 - step / self.STEPS for step in range(self.STEPS)]
        if fmt.scale is None or fmt.scale.zero == "none":
            top = torch.maximum(-low, high)
            yield from ((-top * share, top * share) for share in shares)
            return
        coarse = shares[:: self.STEPS // 20]
        yield from ((low * a, high * b) for a in coarse for b in coarse)


class LeastSquares(_Searched):
    """`mse`."""

    def loss(self, rounded: Tensor, inside: Tensor) -> float:
        return float((self.counts * (self.centres - rounded).double().square()).sum())


class Entropy(_Searched):
    """`entropy`: Kullback and Leibler's divergence from the counts, those outside put at the ends, to the
    counts that are left when the numbers of a code are spread evenly over the bins that it stands for.
    """

    def loss(self, rounded: Tensor, inside: Tensor) -> float:
        if not inside.any():
            return torch.inf
        counts = self._without_zeros()
        kept = torch.where(inside, counts, 0.0)
        clipped = kept.clone()
        first, last = (int(inside.nonzero()[end]) for end in (0, -1))
        clipped[first] += counts[:first].sum()
        clipped[last] += counts[last + 1 :].sum()
        codes = torch.unique(rounded, return_inverse=True)[1]
        full = (kept > 0).double()
        sums = torch.zeros(int(codes.max()) + 1, dtype=torch.float64)
        bins = sums.scatter_add(0, codes, full).clamp(min=1)
        spread = full * (sums.scatter_add(0, codes, kept) / bins)[codes]
        return _divergence(clipped, spread)

    def _without_zeros(self) -> Tensor:
        """The counts, those of zeros left out: zero is a code of every format and loses nothing, and behind a
        ReLU the half of all numbers that it is would count as lost for every code but the narrowest.
        """
        counts, middle = self.counts.clone(), len(self.counts) // 2
        counts[middle] = torch.minimum(counts[middle], counts[middle + 1])
        return counts


def _divergence(counts: Tensor, model: Tensor) -> float:
    """sum p log(p / q). A bin that only one of them has gets a little of the other, as TensorRT's does."""
    small = 1e-4
    p, q = (part / part.sum() for part in (counts, model))
    q = (q + small / len(q)) / (1 + small)
    held = p > 0
    return float((p[held] * (p[held] / q[held]).log()).sum())
