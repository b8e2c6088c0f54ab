"""From source text to a kernel that runs: written to a file by its hash, imported, launched.

In: a spec, a schedule, tensors. Out: y. `launch` is the only place that imports Triton.

    launch(spec, schedule, x, parts)   ->   y [M, n]

Triton reads a function's source from its file, so generated modules live in a folder beside torch's own
compile caches, named by what is in them: a file is written once, by whoever comes first, and renamed in.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...formats import Quantized
from ..schedule import Schedule
from ..slices import Walk, walk
from ..spec import CodegenError, GemmSpec
from .source import source
from .values import needs_table
from .whole import BLOCK_N, whole_source


def folder() -> Path:
    """Where generated modules lie: $TORCHINDUCTOR_CACHE_DIR or torch's default, then `bitfold`."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "bitfold"


@lru_cache(maxsize=1024)
def module(text: str) -> ModuleType:
    """The module with this source, imported."""
    name = "k" + hashlib.sha256(text.encode()).hexdigest()[:32]
    path = folder() / f"{name}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@lru_cache(maxsize=1024)
def kernel(spec: GemmSpec, schedule: Schedule, plain: bool = False) -> Any:
    """The jitted function for this spec and schedule."""
    return module(source(spec, schedule, plain=plain)).kernel


@lru_cache(maxsize=1024)
def _whole_kernel(spec: GemmSpec) -> Any:
    return module(whole_source(spec)).kernel


def decode(spec: GemmSpec, parts: Sequence[Tensor], x: Tensor) -> Tensor:
    """The weight [n, k] in x's dtype, bit for bit `dequantize`'s, in fresh memory."""
    w = x.new_empty(spec.n, spec.k)
    given = _arguments(spec, x, parts, None, w, None)
    found = walk(spec.weight, spec.k)
    assert isinstance(found, Walk)
    wanted = ("codes", "scales", "zeros", "level", "table", "SN", "SG")
    _whole_kernel(spec)[-(-spec.n // BLOCK_N), found.runs](w=w, **{name: given[name] for name in wanted})
    return w


@lru_cache(maxsize=64)
def _table(spec: GemmSpec, device: torch.device) -> Tensor:
    return torch.tensor(spec.weight.element.values(), dtype=torch.float32, device=device)


def grid(spec: GemmSpec, schedule: Schedule, m: int) -> tuple[int, int, int]:
    """Programs: tiles of the weight's rows, parts of the sum, blocks of x's rows."""
    return -(-spec.n // schedule.block_n), schedule.split, -(-m // schedule.block_m)


def check(spec: GemmSpec, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> None:
    """One sentence if these are no operands of this spec; before anything is launched."""
    if x.ndim != 2 or x.shape[1] != spec.k or x.dtype != spec.dtype:
        raise CodegenError(
            f"the kernel {spec} takes x [M, {spec.k}] in {spec.x}, not {tuple(x.shape)} in {x.dtype}"
        )
    if len(parts) != len(spec.weight.parts):
        raise CodegenError(f"{spec.weight} stores {', '.join(spec.weight.parts)}, not {len(parts)} tensors")
    if x.stride(1) != 1 and x.shape[0] > 0:
        raise CodegenError("the rows of x must be contiguous; call x.contiguous() before the kernel")
    codes = parts[0]
    if not codes.is_contiguous() or codes.data_ptr() % 16:
        raise CodegenError("packed codes must be contiguous and start at a multiple of 16 bytes; clone them")
    if (bias is not None) != spec.bias:
        raise CodegenError(f"the kernel {spec} {'needs' if spec.bias else 'takes no'} bias")
    if x.shape[0] * max(spec.k, spec.n) >= 2**31:
        raise CodegenError(f"x of shape {tuple(x.shape)} is past 32-bit addresses; split it along its rows")


def launch(
    spec: GemmSpec,
    schedule: Schedule,
    x: Tensor,
    parts: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    workspace: tuple[Tensor, Tensor] | None = None,
    plain: bool = False,
) -> Tensor:
    """x [M, k] times the weight's parts, transposed: y [M, n].

    workspace: for a split schedule, (float32 [split * M * n], int32 zeros [programs]); made if None, and left
    as it was found: the locks are zero again.
    """
    m = x.shape[0]
    y = x.new_empty(m, spec.n) if out is None else out
    if m == 0:
        return y
    if schedule.overlap and x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        schedule.check_arch(10 * major + minor)
    programs = grid(spec, schedule, m)
    if schedule.split > 1 and workspace is None:
        workspace = (
            x.new_empty(schedule.split * m * spec.n, dtype=torch.float32),
            x.new_zeros(programs[0] * programs[2], dtype=torch.int32),
        )
    given = _arguments(spec, x, parts, bias, y, workspace)
    kernel(spec, schedule, plain)[programs](**given, **_options(schedule))
    return y


def _options(schedule: Schedule) -> dict[str, Any]:
    overlap = {"launch_pdl": True} if schedule.overlap else {}
    return {"num_warps": schedule.warps, "num_stages": schedule.stages, **overlap}


def _arguments(
    spec: GemmSpec,
    x: Tensor,
    parts: Sequence[Tensor],
    bias: Tensor | None,
    y: Tensor,
    workspace: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """The kernel's arguments by name; y stands for tensors that this spec does not have."""
    q = Quantized.from_parts(spec.weight, parts, spec.k)
    partial, locks = workspace if workspace is not None else (y, y)
    scales = y if q.scales is None else q.scales
    if scales.dtype == torch.float8_e4m3fn:
        scales = scales.view(torch.uint8)
    strides = scales.stride() if q.scales is not None and scales.ndim == 2 else (0, 0)
    return {
        "x": x,
        "codes": q.codes.view(torch.int16),
        "scales": scales,
        "zeros": y if q.zeros is None else q.zeros,
        "level": y if q.tensor_scale is None else q.tensor_scale,
        "table": _table(spec, x.device) if needs_table(spec.weight.element) else y,
        "bias": y if bias is None else bias,
        "y": y,
        "partial": partial,
        "locks": locks,
        "m": x.shape[0],
        "x_stride": x.stride(0),
        "SN": strides[0],
        "SG": strides[1],
    }


def warm(spec: GemmSpec, schedule: Schedule, parts: Sequence[Tensor]) -> None:
    """Compiles the kernel into Triton's cache without running it; `parts` may be on `meta`."""
    x = torch.empty(2, spec.k, dtype=spec.dtype, device="meta")
    bias = torch.empty(spec.n, dtype=spec.dtype, device="meta") if spec.bias else None
    y = torch.empty(2, spec.n, dtype=spec.dtype, device="meta")
    locks = torch.empty(1, dtype=torch.int32, device="meta")
    workspace = (torch.empty(1, device="meta"), locks) if schedule.split > 1 else None
    given = _arguments(spec, x, parts, bias, y, workspace)
    types = {name: value.dtype if isinstance(value, Tensor) else value for name, value in given.items()}
    # Triton stands tensors in for dtypes among positional arguments only.
    kernel(spec, schedule).warmup(*types.values(), grid=(1,), **_options(schedule))
