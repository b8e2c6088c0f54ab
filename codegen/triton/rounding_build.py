"""Rounding kernels from a spec to the launch.

In: a spec and tensors, contiguous. Out: rounded numbers, or gradients.

    rounded(spec, x, [])                       ->   x rounded, in its shape and dtype
    gradients(spec, x, [scales], gradient)     ->   for x; for what is learned, float32, one a group
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...formats import format
from ..rounding import RoundingSpec
from .build import module
from .inspect import Compiled
from .lines import POINTERS
from .machine_code import resources
from .rounding import source, sums_of


@lru_cache(maxsize=256)
def kernel(spec: RoundingSpec, plain: bool = False) -> Any:
    """The jitted function; `plain` for the interpreter."""
    return module(source(spec, plain)).kernel


@lru_cache(maxsize=256)
def options(spec: RoundingSpec) -> dict[str, Any]:
    """How it is compiled: a product fused into a sum would round once where the format rounds twice."""
    warps = 4 if spec.direction == "forward" else 2
    return {"num_warps": max(warps, spec.wide * spec.rows // 1024), "enable_fp_fusion": False}


def rounded(spec: RoundingSpec, x: Tensor, scales: Sequence[Tensor], plain: bool = False) -> Tensor:
    """x [..., K] rounded."""
    y = torch.empty_like(x)
    _launch(spec, x, [x, *_flat(scales), y], plain)
    return y


def gradients(
    spec: RoundingSpec, x: Tensor, scales: Sequence[Tensor], gradient: Tensor, plain: bool = False
) -> tuple[Tensor, ...]:
    """(for x, for each number that is learned)."""
    count = x.numel() // spec.group
    for_x = torch.empty_like(x)
    sums = [torch.empty(count, dtype=torch.float32, device=x.device) for _ in spec.learned]
    _launch(spec, x, [x, *_flat(scales), gradient, for_x, *sums], plain)
    return for_x, *sums


def _launch(spec: RoundingSpec, x: Tensor, given: Sequence[Tensor], plain: bool) -> None:
    count = x.numel() // spec.group
    if count:
        kernel(spec, plain)[(-(-count // spec.rows),)](*given, count, **options(spec))


def _flat(scales: Sequence[Tensor]) -> list[Tensor]:
    return [part.reshape(-1).contiguous() for part in scales]


@lru_cache(maxsize=256)
def inspect_rounding(spec: RoundingSpec, arch: int = 90) -> Compiled:
    """The kernel compiled for compute capability `arch`, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel(spec)
    scale = format(spec.format).scale
    assert scale is not None
    numbers = POINTERS[spec.lane]
    kinds = {"count": "i32", "scales": POINTERS[scale.dtype], **dict.fromkeys(sums_of(spec), "*fp32")}
    kinds["zeros"] = "*i8" if format(spec.format).element.low < 0 else "*u8"
    types = {name: kinds.get(name, numbers) for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if types[name][0] == "*"
    }
    made = triton.compile(
        ASTSource(function, types, {}, aligned), target=GPUTarget("cuda", arch, 32), options=options(spec)
    )
    registers, spills = resources(made.asm["cubin"])
    return Compiled(
        registers, spills, made.metadata.shared, made.asm["ptx"], made.asm["ttgir"], made.asm["cubin"]
    )
