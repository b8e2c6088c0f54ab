"""What an algorithm may do with a format's scales and columns without knowing which format it is.

In: a format and its parameters (scales, [zeros], [tensor_scale]) for a weight [N, K]. Out: other parameters
that the format can store, and single columns rounded under them.

    first = f.choose(w)
    shrunk(f, w, 0.8, first)             the parameters that the format's own rule has for 0.8 * w
    multipliers(f, first)                what each block's elements are multiplied by, float32
    with_multipliers(f, first, m)        the parameters nearest to such multipliers that can be stored
    Columns(f, first, N).round(w[:, 5:6], 5)   the values of column 5: those that f.fake_quantize gives it

Every rule for scales is linear in the data, up to how scales are stored, so "data 0.8 times as large" is
clipping for all of them; a tensor scale (NVFP4) stays as it was first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from . import affine, rules
from .errors import FormatError
from .format import Format
from .granularity import Granularity
from .integer import Integer
from .sparsity import Dense

Params = tuple[Tensor, ...]

_ROWS = Granularity(1, None)


def shrunk(f: Format, x: Tensor, ratio: float, first: Sequence[Tensor]) -> Params:
    """Parameters for x [..., K] as if it were `ratio` times as large. `first`: what `f.choose(x)` gave."""
    if f.scale is None or not f.scale.two_level:
        return f.choose(x * ratio)
    kept = f.sparsity.compress(x)[0].to(torch.float32)
    amax = f.sparsity.narrowed(f.scale.granularity).amax(kept) * ratio
    return rules.block_scales(f.element, f.scale, amax, first[1]), first[1]


def multipliers(f: Format, params: Sequence[Tensor]) -> Tensor:
    """float32, in the scales' shape: the value of an element of 1 (zero points aside)."""
    if f.scale is None:
        raise FormatError(f"{f} has no scales")
    scales = f.scale.decode(params[0])
    return scales * params[1] if f.scale.two_level else scales


def with_multipliers(f: Format, params: Sequence[Tensor], wanted: Tensor) -> Params:
    """`params` with the storable scales nearest to `wanted` (in the scales' shape); the rest unchanged."""
    if f.scale is None:
        raise FormatError(f"{f} has no scales")
    if f.scale.dtype == "e8m0":
        exponent = torch.log2(wanted.clamp(min=2.0**-126)).round().clamp(-127, 127)
        return ((exponent + 127).to(torch.uint8), *params[1:])
    level = params[1] if f.scale.two_level else torch.ones_like(wanted)
    return (f.scale.store(wanted / torch.where(level == 0, 1.0, level)), *params[1:])


class Columns:
    """A weight's columns one by one, or a few of a group at a time, under parameters that are fixed."""

    def __init__(self, f: Format, params: Sequence[Tensor], rows: int) -> None:
        if not isinstance(f.sparsity, Dense):
            raise FormatError(f"{f} stores some of the columns only; a dense format has them one by one")
        self.format, self.params, self.rows = f, tuple(params), rows

    @cached_property
    def _by_row(self) -> list[Tensor]:
        """Each parameter with a row for each row of the weight, or one for all of them."""
        share = self.rows // self.params[0].shape[0] if self.params else 1
        return [p.repeat_interleave(share, 0) if p.shape[0] > 1 else p for p in self.params]

    def of_group(self, column: int) -> list[Tensor]:
        """The parameters of the group that `column` is in, [rows or 1, 1] each."""
        cols = self.format.cols
        group = column // cols if cols is not None else 0
        return [p[:, group : group + 1] if p.shape[-1] > 1 else p for p in self._by_row]

    def round(self, values: Tensor, column: int) -> Tensor:
        """float32 values [rows, c] of columns `column` and after, of one group, as the format has them."""
        f = self.format
        if f.scale is None:
            return f.element.decode(f.element.encode(values))
        params = self.of_group(column)
        codes = affine.encode(f.element, f.scale, _ROWS, values, params)
        return affine.decode(f.element, f.scale, _ROWS, codes, params)


def spacing(f: Format, params: Sequence[Tensor], w: Tensor) -> Tensor:
    """How far apart the format's values are around each number of w [N, K], float32; positive."""
    if f.scale is None:
        raise FormatError(f"{f} has no scales")
    grain = f.scale.granularity
    unit = grain.spread(multipliers(f, params)).abs()
    blocks = grain.split(w.to(torch.float32))
    if isinstance(f.element, Integer):
        return (unit * 2.0**-f.element.fraction).expand_as(blocks).reshape(w.shape)
    known = torch.tensor(f.element.values(), device=w.device)
    values = torch.unique(known[known.isfinite()])  # sorted
    above = torch.searchsorted(values, (blocks / torch.where(unit == 0, 1.0, unit)).contiguous())
    above = above.clamp(1, len(values) - 1)
    gaps: Tensor = (values[above] - values[above - 1]) * unit
    return gaps.reshape(w.shape)
