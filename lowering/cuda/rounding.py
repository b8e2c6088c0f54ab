"""The operators that round in training, on a GPU: one generated kernel a direction.

In: the operands of `formats/round_groups.py`. Out: the same bits (sums of gradients in another order).

What has no kernel (a format with one scale for everything, say) is computed by the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...codegen import CodegenError
from ...codegen.attention import TYPES
from ...codegen.rounding import RoundingSpec, rounding_spec
from ...codegen.triton import rounding_build
from ...formats import format, round_groups
from ...formats.estimators import Back
from ...formats.gradient import Gradient


def rounded(x: Tensor, scales: Sequence[Tensor], text: str) -> Tensor:
    """`round_groups`."""
    spec = _spec(x, text, "forward", bool(scales))
    if spec is None:
        return round_groups.round_groups(x, scales, text)
    return rounding_build.rounded(spec, x.contiguous(), scales)


def gradients(
    gradient: Tensor, x: Tensor, scales: Sequence[Tensor], held: Sequence[Tensor], text: str, kind: str
) -> list[Tensor]:
    """`round_groups_backward`."""
    how = Gradient.parse(kind)
    spec = _spec(x, text, how.name, True) if gradient.dtype == x.dtype else None
    if spec is None:
        return round_groups.round_groups_backward(gradient, x, scales, held, text, kind)
    found = rounding_build.gradients(spec, x.contiguous(), scales, gradient.contiguous())
    if not spec.learned:
        return [found[0]]
    back = Back(format(text), x, tuple(scales), held, gradient, how.number, how.item)
    factor = how.estimator.factor(back)
    sums = (part if factor is None else part * factor for part in found[1:])
    return [found[0], *(one.reshape(part.shape).to(part.dtype) for one, part in zip(sums, held, strict=True))]


def has_kernel(x: Tensor, text: str) -> bool:
    """Whether there is one. Alone it takes the time of a copy of x (`benchmarks/rounding_kernels.py`); in a
    whole step (`benchmarks/qat_step.py`) it is not shown to be faster than what a compiler fuses."""
    return _spec(x, text, "forward", False) is not None


def _spec(x: Tensor, text: str, direction: str, given: bool) -> RoundingSpec | None:
    lane = next((name for name, dtype in TYPES.items() if dtype == x.dtype), None)
    if lane is None or x.ndim == 0:
        return None
    try:
        return rounding_spec(format(text), lane, x.shape[-1], direction, given)
    except CodegenError:
        return None
