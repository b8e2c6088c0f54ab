"""The operators that round in training, on a GPU: one generated kernel a direction.

In: the operands of `formats/round_groups.py`. Out: the same bits (sums of gradients in another order).

They are called where a kernel is asked for by name or is known to be there, so that what has none (a format
with one scale for everything, say) is an error, not the reference, which no compiler could fuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...codegen import CodegenError
from ...codegen.attention import TYPES
from ...codegen.rounding import FORWARD, RoundingSpec, rounding_spec
from ...codegen.triton import rounding_build
from ...formats import format
from ...formats.estimators import Back
from ...formats.gradient import Gradient


def rounded(x: Tensor, scales: Sequence[Tensor], text: str) -> Tensor:
    """`round_groups`. Raises CodegenError if there is no such kernel."""
    found = spec(x.dtype, _row(x), text, FORWARD, given=bool(scales))
    return rounding_build.rounded(found, x.contiguous(), scales)


def gradients(
    gradient: Tensor, x: Tensor, scales: Sequence[Tensor], held: Sequence[Tensor], text: str, kind: str
) -> list[Tensor]:
    """`round_groups_backward`. Raises CodegenError if there is no such kernel."""
    how = Gradient.parse(kind)
    if gradient.dtype != x.dtype:
        raise CodegenError(f"a kernel takes gradients of the dtype of x, {x.dtype}, not {gradient.dtype}")
    made = spec(x.dtype, _row(x), text, how.name, given=True)
    found = rounding_build.gradients(made, x.contiguous(), scales, gradient.contiguous())
    if not made.learned:
        return [found[0]]
    factor = how.estimator.factor(Back(format(text), x, tuple(scales), held, gradient, how.number, how.item))
    sums = (part if factor is None else part * factor for part in found[1:])
    return [found[0], *(one.reshape(part.shape).to(part.dtype) for one, part in zip(sums, held, strict=True))]


def has_kernel(x: Tensor, text: str) -> bool:
    """Whether there is one. Alone it takes the time of a copy of x (`benchmarks/rounding_kernels.py`); in a
    whole step (`benchmarks/qat_step.py`) it is not shown to be faster than what a compiler fuses."""
    try:
        spec(x.dtype, _row(x), text, FORWARD, given=False)
    except CodegenError:
        return False
    return True


@lru_cache(maxsize=1024)
def spec(dtype: torch.dtype, k: int, text: str, direction: str, *, given: bool) -> RoundingSpec:
    """The kernel for rows of k numbers. Raises CodegenError, one sentence, if there is none.

    Kept, since it is asked for at each call, before a launch that a GPU may wait for."""
    lane = next((name for name, held in TYPES.items() if held == dtype), str(dtype).removeprefix("torch."))
    return rounding_spec(format(text), lane, k, direction, given)


def _row(x: Tensor) -> int:
    return x.shape[-1] if x.ndim else 1
