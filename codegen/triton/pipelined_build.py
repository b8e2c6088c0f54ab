"""From a pipelined schedule to a kernel that runs.

In: a spec, a schedule, tensors. Out: y. Triton is imported inside functions.

    launch(spec, schedule, x, parts)   ->   y [M, n]

x, codes and y come to the kernel as tensor maps of the copy engine, made anew for each call on the host: a
pointer, sizes and strides, in an argument of 128 bytes. A captured graph holds them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...formats import Quantized
from ..pipelined import Pipelined
from ..spec import CodegenError, GemmSpec
from .arguments import reads_bytes, stored_bytes
from .build import module
from .locks import locks
from .pipelined import pipelined_source

ALIGNED = 16  # bytes: what addresses and strides of the copy engine are multiples of


@lru_cache(maxsize=1024)
def pipelined_kernel(spec: GemmSpec, schedule: Pipelined) -> Any:
    """The jitted function for this spec and schedule."""
    return module(pipelined_source(spec, schedule)).kernel


def grid(spec: GemmSpec, schedule: Pipelined, m: int, multiprocessors: int) -> int:
    """Programs: what the multiprocessors hold, or fewer where there is less to do."""
    tiles = -(-spec.n // schedule.block_n) * -(-m // schedule.block_m)
    # Every program that shares tiles must have a part in one: those beside it wait for that part.
    pieces = tiles * schedule.walk(spec).runs if schedule.streamk else tiles
    return min(multiprocessors * schedule.programs, pieces)


def workspace(
    spec: GemmSpec, schedule: Pipelined, multiprocessors: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Parts of tiles, float32, and flags, int32 zeros, for any M: one tile a program. Calls that overlap in
    time need one each."""
    programs = multiprocessors * schedule.programs if schedule.streamk else 0
    size = programs * schedule.block_n * schedule.block_m
    flags = like.new_zeros(max(programs * schedule.groups, 1), dtype=torch.int32)
    return like.new_empty(max(size, 1), dtype=torch.float32), flags


def launch(
    spec: GemmSpec,
    schedule: Pipelined,
    x: Tensor,
    parts: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    x_scales: Tensor | None = None,
    out: Tensor | None = None,
    room: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x [M, k], or its codes and scales, times the weight's parts, transposed: y [M, n].

    room: `workspace`'s, for a schedule with streamk; found if None, left with flags of zero.
    """
    m = x.shape[0]
    y = x.new_empty(m, spec.n, dtype=spec.dtype) if out is None else out
    if m == 0:
        return y
    check(spec, x, parts, y)
    if (bias is None) == spec.bias or (
        bias is not None and (bias.shape != (spec.n,) or bias.dtype != spec.dtype)
    ):
        raise CodegenError(f"the kernel {spec} takes {'a bias of its columns' if spec.bias else 'no bias'}")
    found = torch.cuda.get_device_properties(x.device)
    schedule.check_arch(10 * found.major + found.minor)
    if room is None:
        count = found.multi_processor_count * schedule.programs if schedule.streamk else 0
        partial = x.new_empty(max(count * schedule.block_n * schedule.block_m, 1), dtype=torch.float32)
        room = partial, locks(x.device, max(count * schedule.groups, 1))
    given = _arguments(spec, schedule, x, x_scales, parts, bias, y, room)
    programs = grid(spec, schedule, m, found.multi_processor_count)
    pipelined_kernel(spec, schedule)[(programs,)](*given, **options(schedule))
    return y


def aligned(held: Tensor) -> bool:
    """Whether the copy engine can take rows of it as they lie."""
    strides = [stride * held.element_size() for stride in held.stride()[:-1]]
    return held.stride(-1) == 1 and not any(place % ALIGNED for place in (*strides, held.data_ptr()))


def check(spec: GemmSpec, x: Tensor, parts: Sequence[Tensor], y: Tensor) -> None:
    """One sentence if the copy engine cannot take these; before anything is launched."""
    wanted = spec.dtype if spec.activation is None else torch.uint8
    if x.ndim != 2 or x.shape[1] != spec.k or x.dtype != wanted:
        raise CodegenError(
            f"the kernel {spec} takes x [M, {spec.k}] in {wanted}, not {tuple(x.shape)} in {x.dtype}"
        )
    if len(parts) != len(spec.weight.parts):
        raise CodegenError(f"{spec.weight} stores {', '.join(spec.weight.parts)}, not {len(parts)} tensors")
    if y.shape != (x.shape[0], spec.n) or y.dtype != spec.dtype:
        raise CodegenError(
            f"the kernel {spec} writes y [{x.shape[0]}, {spec.n}] in {spec.x}, not {tuple(y.shape)} in "
            f"{y.dtype}"
        )
    rows = [part.shape[0] for part in parts[:1]]
    if rows != [spec.n]:
        raise CodegenError(f"the kernel {spec} reads codes of {spec.n} rows, not of {rows[0]}")
    for name, held in (("x", x), ("codes", parts[0]), ("y", y)):
        if not aligned(held):
            raise CodegenError(
                f"the rows of {name} must be contiguous and start at multiples of {ALIGNED} bytes; clone it"
            )


def options(schedule: Pipelined) -> dict[str, Any]:
    """What the compiler is told beside the source."""
    most = {"maxnreg": schedule.at_start} if schedule.residents > 1 else {}
    overlap = {"launch_pdl": True} if schedule.overlap else {}
    return {"num_warps": schedule.warps} | most | overlap


def blocks(spec: GemmSpec, schedule: Pipelined) -> dict[str, list[int]]:
    """What one copy moves, of each tensor that the copy engine sees."""
    length = schedule.walk(spec).length
    return {
        "x": [schedule.block_m, length],
        "codes": [schedule.rows, length],
        "y": [schedule.block_m, schedule.rows],
    }


def shared_layout(block: Sequence[int], width: int) -> Any:
    """Rows of up to 128 bytes of numbers of `width` bytes, swizzled so that neither the tensor cores nor
    eight rows at once collide."""
    from triton.experimental.gluon.language._layouts import NVMMASharedLayout

    return NVMMASharedLayout(min(128, width * block[1]), 8 * width, 2)


def widths(spec: GemmSpec) -> dict[str, int]:
    """Bytes of a number, of each tensor that the copy engine sees."""
    width = Pipelined.width(spec)
    return {"x": width, "codes": width, "y": 2}


def _arguments(
    spec: GemmSpec,
    schedule: Pipelined,
    x: Tensor,
    x_scales: Tensor | None,
    parts: Sequence[Tensor],
    bias: Tensor | None,
    y: Tensor,
    room: tuple[Tensor, Tensor],
) -> list[Any]:
    """The kernel's arguments in order; y stands for tensors that this spec does not have."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    q = Quantized.from_parts(spec.weight, parts, spec.k)
    tensors = {"x": x, "codes": q.codes.view(torch.int16), "y": y}
    if spec.activation is not None:
        lanes = torch.int8 if spec.lane == "int8" else torch.float8_e4m3fn
        units = lanes if reads_bytes(spec) else torch.int8
        tensors |= {"x": x.view(lanes), "codes": q.codes.view(units).view(spec.n, -1)}
    maps = [
        TensorDescriptor.from_tensor(tensors[name], block, shared_layout(block, widths(spec)[name]))
        for name, block in blocks(spec, schedule).items()
    ]
    scales = y if q.scales is None else q.scales
    strides = scales.stride() if q.scales is not None and scales.ndim == 2 else (0, 0)
    return [
        *maps,
        stored_bytes(scales),
        y if x_scales is None else stored_bytes(x_scales),
        y if q.zeros is None else q.zeros,
        y if q.tensor_scale is None else q.tensor_scale,
        y if bias is None else bias,
        *room,
        x.shape[0],
        *strides,
    ]


def warm(spec: GemmSpec, schedule: Pipelined, parts: Sequence[Tensor]) -> None:
    """Compiles the kernel into Triton's cache without running it; `parts` may be on `meta`."""
    x, x_scales = torch.empty(16, spec.k, dtype=spec.dtype, device="meta"), None
    if spec.activation is not None:
        x, x_scales, *_ = (
            part.to("meta") for part in spec.activation.quantize(torch.zeros(16, spec.k)).parts
        )
    y = torch.empty(16, spec.n, dtype=spec.dtype, device="meta")
    bias = torch.empty(spec.n, dtype=spec.dtype, device="meta") if spec.bias else None
    room = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.int32, device="meta")
    given = _arguments(spec, schedule, x, x_scales, parts, bias, y, room)
    # Triton stands tensors in for dtypes; tensor maps it takes as they are.
    types = [value.dtype if isinstance(value, Tensor) else value for value in given]
    pipelined_kernel(spec, schedule).warmup(*types, grid=(1,), **options(schedule))
