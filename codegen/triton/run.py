"""Runs a spec by a schedule of either kind, and compiles it without running.

In: a spec, a `Schedule` or a `Pipelined`, the call's tensors. Out: y [M, n].

    run(spec, choose(spec, 64), [x, codes, scales])   ->   y [64, n]
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..pipelined import Pipelined
from ..schedule import Schedule
from ..spec import GemmSpec
from . import build, pipelined_build


def run(
    spec: GemmSpec, schedule: Schedule | Pipelined, inputs: Sequence[Tensor], *, out: Tensor | None = None
) -> Tensor:
    """The result [M, n] of a kernel on its inputs (see `spec.py`), x [M, k] among them."""
    if isinstance(schedule, Schedule):
        return build.launch(spec, schedule, inputs, out=out)
    given = build.check(spec, inputs)
    # The copy engine starts at multiples of 16 bytes; what lies elsewhere is moved.
    x = given.x if pipelined_build.aligned(given.x) else given.x.new_empty(given.x.shape).copy_(given.x)
    bias = given.biases[0] if spec.bias else None
    return pipelined_build.launch(spec, schedule, x, given.parts[0], bias, x_scales=given.x_scales, out=out)


def warm(spec: GemmSpec, schedule: Schedule | Pipelined, parts: Sequence[Tensor]) -> None:
    """Compiles the kernel into Triton's cache; `parts` of one weight, may be on `meta`."""
    if isinstance(schedule, Schedule):
        build.warm(spec, schedule, parts)
    else:
        pipelined_build.warm(spec, schedule, parts)
