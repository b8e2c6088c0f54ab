"""One weight whose rounding and scales are learned by descent, whatever its format.

In: a format and a draft. Out: values that gradients are taken of, moves along them, and the best draft.

    r = Rounding(f, draft);  v = r.values();  r.slopes(gradient of a loss by v, v)    by `shift` and `stretch`
    r.shift -= 0.002 * slope;  r.keep();  r.draft()

Two things move. `shift`, in spacings of the format: the number that is rounded is the weight plus that many,
never more than one and a half; rounding passes the gradient straight through. `stretch`: the logarithm of
what each scale is multiplied by, and each number with it: codes stay, and a value's slope in it is the value.

It starts at the weight. A number that was rounded to the farther side (gptq) starts just inside what rounds
so. Farther inside is worse: then nothing turns for many steps, and too much at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ...formats.fit import Params, multipliers, spacing, with_multipliers
from .draft import Draft

REACH = 1.5
INSIDE = 0.45


class Rounding:
    """`turned`: the layer's input goes through a transform first."""

    def __init__(self, fmt: Format, draft: Draft, turned: bool = False) -> None:
        self.format, self.turned, self.weight = fmt, turned, draft.weight
        self.first: Params = tuple(draft.chosen(fmt))
        self.gap = spacing(fmt, self.first, draft.weight)
        self.shift = torch.zeros_like(draft.weight)
        if draft.values is not None:
            self.shift = self._start(draft.values)
        self.stretch = torch.zeros_like(multipliers(fmt, self.first)) if moves(fmt) else None
        self.best = draft if draft.values is not None else Draft(draft.weight, self.first)

    def _start(self, decided: Tensor) -> Tensor:
        """0 where the value is the nearest; else from the weight to just inside what rounds to the value."""
        away = (decided - self.weight) / self.gap
        shift = away - INSIDE * away.sign()
        # Where a value's neighbours are not equally far, half of the wider gap may be too much.
        same = self.format.fake_quantize(self.weight + self.gap * shift, self.first) == decided
        shift = torch.where(same, shift, away)
        return torch.where(self.format.fake_quantize(self.weight, self.first) == decided, 0.0, shift)

    def params(self) -> Params:
        """The scales as they are stored now."""
        if self.stretch is None:
            return self.first
        stretched = multipliers(self.format, self.first) * self.stretch.exp()
        return with_multipliers(self.format, self.first, stretched)

    def place(self) -> Tensor:
        """The numbers that are rounded, but for how far scales have moved."""
        return self.weight + self.gap * self.shift

    def values(self) -> Tensor:
        """The rounded weight."""
        params = self.params()
        if self.stretch is None:
            return self.format.fake_quantize(self.place(), params)
        assert self.format.scale is not None
        # Numbers grow with their scale, as it is stored, so that codes are a matter of `shift` alone.
        grain = self.format.scale.granularity
        grown = multipliers(self.format, params) / multipliers(self.format, self.first)
        numbers = grain.split(self.place()) * grain.spread(grown)
        return self.format.fake_quantize(numbers.reshape(self.weight.shape), params)

    def slopes(self, gradient: Tensor, values: Tensor) -> list[Tensor]:
        """Of the loss by `shift`, and by `stretch` if it moves, from that by the values that it has now."""
        if self.stretch is None:
            return [gradient * self.gap]
        assert self.format.scale is not None
        return [gradient * self.gap, self.format.scale.granularity.means(gradient * values)]

    def movable(self) -> list[Tensor]:
        """What `slopes` are by."""
        return [self.shift] if self.stretch is None else [self.shift, self.stretch]

    def bound(self) -> None:
        """Numbers that were moved past their reach go back to it."""
        self.shift.clamp_(-REACH, REACH)

    def keep(self) -> None:
        """What is now is the best so far."""
        self.best = Draft(self.weight, self.params(), self.values())

    def draft(self) -> Draft:
        """The best that was kept; what was given, if nothing was."""
        return self.best


def moves(fmt: Format) -> bool:
    """Whether scales may take any size: not powers of two, and nothing beside them that they would move."""
    return fmt.scale is not None and fmt.scale.dtype != "e8m0" and fmt.scale.zero == "none"
