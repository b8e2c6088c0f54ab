"""What the compiler makes of the attention kernels, for any GPU, without one.

In: a spec, a schedule, an architecture. Out: a `Compiled`, as `inspect.py` has it.

    inspect_attention(spec, schedule, arch=90).registers   ->   127
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..attention import AttentionSpec, grouped
from ..attention_schedule import AttentionSchedule
from ..schedule import OVERLAP_FROM
from . import attention, cache_write
from .attention_build import kernels, write_kernel
from .inspect import Compiled, _resources

_POINTERS = {"bf16": "*bf16", "f16": "*fp16", "f32": "*fp32", "e8m0": "*u8"}


@lru_cache(maxsize=256)
def inspect_attention(spec: AttentionSpec, schedule: AttentionSchedule, arch: int = 90) -> Compiled:
    """The decode kernel compiled for compute capability `arch`, q with rows at multiples of 16 numbers."""
    options = {"num_warps": schedule.warps, "num_stages": schedule.stages}
    aligned = {"q_b", "q_h", "q_t"}
    return _compiled(kernels(spec, schedule).kernel, spec, set(attention.INTEGERS), aligned, arch, options)


@lru_cache(maxsize=256)
def inspect_combine(spec: AttentionSpec, schedule: AttentionSchedule, arch: int = 90) -> Compiled:
    """The kernel that adds 64 splits up, compiled."""
    options = {"num_warps": 4} | ({"launch_pdl": True} if schedule.overlap else {})
    integers = {"rows", "splits", "t"}
    return _compiled(kernels(spec, schedule).combine, spec, integers, set(), arch, options, {"SPLITS": 64})


@lru_cache(maxsize=256)
def inspect_write(spec: AttentionSpec, arch: int = 90) -> Compiled:
    """The quantizing write, compiled."""
    overlap = arch >= OVERLAP_FROM
    options = {"num_warps": 1, "enable_fp_fusion": False} | ({"launch_pdl": True} if overlap else {})
    aligned = {"k_b", "k_h", "k_t", "v_b", "v_h", "v_t"}
    return _compiled(write_kernel(spec, overlap), spec, set(cache_write.INTEGERS), aligned, arch, options)


def _compiled(
    function: Any,
    spec: AttentionSpec,
    integers: set[str],
    aligned: set[str],
    arch: int,
    options: dict[str, Any],
    constants: dict[str, int] | None = None,
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = constants or {}
    types = {name: "i32" if name in integers else _type(spec, name) for name in function.arg_names}
    types |= dict.fromkeys(fixed, "constexpr")
    constexprs = {(function.arg_names.index(name),): value for name, value in fixed.items()}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if types[name].startswith("*") or name in aligned
    }
    made = triton.compile(
        ASTSource(function, types, constexprs, divisible), target=GPUTarget("cuda", arch, 32), options=options
    )
    cubin = made.asm["cubin"]
    registers, spills = _resources(cubin)
    return Compiled(registers, spills, made.metadata.shared, made.asm["ptx"], made.asm["ttgir"], cubin)


def _type(spec: AttentionSpec, name: str) -> str:
    """An argument's type as Triton writes it; absent tensors stand as q does."""
    x = _POINTERS[spec.x]
    which, _, kind = name.partition("_")
    fmt = {"k": spec.k, "v": spec.v}.get(which)
    if fmt is not None and kind == "codes":
        return "*i16"
    if fmt is not None and kind == "scales":
        return x if fmt.scale is None else _POINTERS[fmt.scale.dtype]
    if fmt is not None and kind == "zeros":
        return "*i8" if grouped(fmt) and fmt.element.low < 0 else "*u8"
    if kind == "table" or name in ("partial", "sums"):
        return "*fp32"
    if name in ("limits", "positions", "pages"):
        return "*i32"
    return "*u8" if name == "mask" and spec.mask != "float" else x
