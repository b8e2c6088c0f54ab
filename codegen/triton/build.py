"""From source text to a kernel that runs: written to a file by its hash, imported, launched.

In: a spec, a schedule, tensors. Out: y. `launch` is the only place that imports Triton.

    launch(spec, schedule, [x, codes, scales])   ->   y [M, n]

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
from ..spec import CodegenError, GemmSpec, Inputs
from .arguments import arguments, stored_bytes, sums_are_integers, table, values
from .locks import locks
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
    w = x.new_empty(spec.n, spec.k, dtype=spec.dtype)
    found = walk(spec.weight, spec.k)
    assert isinstance(found, Walk)
    q = Quantized.from_parts(spec.weight, parts, spec.k)
    scales = w if q.scales is None else stored_bytes(q.scales)
    strides = scales.stride() if q.scales is not None and scales.ndim == 2 else (0, 0)
    _whole_kernel(spec)[-(-spec.n // BLOCK_N), found.runs](
        codes=q.codes.view(torch.int16),
        scales=scales,
        zeros=w if q.zeros is None else q.zeros,
        level=w if q.tensor_scale is None else q.tensor_scale,
        table=table(spec, w.device) if needs_table(spec.weight.element) else w,
        w=w,
        SN=strides[0],
        SG=strides[1],
    )
    return w


def grid(spec: GemmSpec, schedule: Schedule, m: int) -> tuple[int, int, int]:
    """Programs: tiles of the weight's rows, parts of the sum, blocks of x's rows. With experts there are at
    most so many blocks: each expert may leave one unfilled."""
    blocks = -(-m // schedule.block_m)
    if spec.experts:
        blocks = min(blocks + spec.experts - 1, m)
    return -(-spec.n // schedule.block_n), schedule.split, blocks


def check(spec: GemmSpec, inputs: Sequence[Tensor]) -> Inputs:
    """The tensors told apart; one sentence, before anything is launched, if they are no operands of this
    spec."""
    given = spec.inputs(inputs)
    x = given.x
    wanted = spec.dtype if spec.activation is None else torch.uint8
    if x.ndim != 2 or x.shape[1] != spec.k or x.dtype != wanted:
        raise CodegenError(
            f"the kernel {spec} takes x [M, {spec.k}] in {wanted}, not {tuple(x.shape)} in {x.dtype}"
        )
    if x.stride(1) != 1 and x.shape[0] > 0:
        raise CodegenError("the rows of x must be contiguous; call x.contiguous() before the kernel")
    if any(tensor.device != x.device for tensor in inputs):
        raise CodegenError("x and the weight's parts are on different devices; move them to one")
    if x.shape[0] * max(spec.k, spec.n) >= 2**31:
        raise CodegenError(f"x of shape {tuple(x.shape)} is past 32-bit addresses; split it along its rows")
    for codes, *params in given.parts:
        _check_codes(spec, codes)
        if not all(part.is_contiguous() for part in params):
            raise CodegenError(f"the scales of {spec.weight} must be contiguous, as its layout stores them")
    for bias in given.biases:
        if bias.shape != (spec.n,) or bias.dtype != spec.dtype or not bias.is_contiguous():
            raise CodegenError(
                f"the kernel {spec} adds a contiguous bias ({spec.n},) in {spec.dtype}, not "
                f"{tuple(bias.shape)} in {bias.dtype}"
            )
    if given.ends is not None and (given.ends.shape != (spec.experts,) or given.ends.dtype != torch.int32):
        raise CodegenError(
            f"the kernel {spec} reads where the rows of each expert end from int32 [{spec.experts}], not "
            f"{tuple(given.ends.shape)} in {given.ends.dtype}"
        )
    if given.x_scales is not None:
        _check_scales(spec, given.x_scales, x.shape[0])
    extras = spec.epilogue.count("e")
    for i, extra in enumerate(given.extras):
        shape = (x.shape[0], spec.n) if i < extras else (spec.n,)
        if extra.shape != shape or extra.dtype != spec.dtype or not extra.is_contiguous():
            raise CodegenError(
                f"the epilogue {spec.epilogue} reads a contiguous tensor {shape} in {spec.dtype}, not "
                f"{tuple(extra.shape)} in {extra.dtype}"
            )
    return given


def _check_codes(spec: GemmSpec, codes: Tensor) -> None:
    if not codes.is_contiguous() or codes.data_ptr() % 16:
        raise CodegenError("packed codes must be contiguous and start at a multiple of 16 bytes; clone them")
    rows = spec.n * max(spec.experts, 1)
    size = spec.weight.layout.row_bytes(spec.weight.element.bits, spec.weight.run, spec.k)
    if codes.numel() != rows * size:
        raise CodegenError(
            f"the kernel {spec} reads {rows} rows of {size} bytes of codes, not a tensor {tuple(codes.shape)}"
        )


def _check_scales(spec: GemmSpec, scales: Tensor, m: int) -> None:
    assert spec.activation is not None and spec.activation.scale is not None
    grain = spec.activation.scale.granularity
    wanted = 1 if grain.rows is None else m * (1 if grain.cols is None else spec.k // grain.cols)
    if scales.numel() != wanted or not scales.is_contiguous():
        raise CodegenError(
            f"the kernel {spec} reads {wanted} scales of x, not a tensor {tuple(scales.shape)}"
        )


def launch(
    spec: GemmSpec,
    schedule: Schedule,
    inputs: Sequence[Tensor],
    *,
    out: Tensor | None = None,
    workspace: tuple[Tensor, Tensor] | None = None,
    plain: bool = False,
) -> Tensor:
    """The result [M, n] of a kernel on its inputs (see `spec.py`), x [M, k] among them.

    workspace: for a split schedule, (sums, float32 or int32 [`workspace_size`], int32 zeros [programs]); made
    if None, and left as it was found: the locks are zero again.
    """
    given = spec.inputs(inputs)
    m = given.x.shape[0]
    y = given.x.new_empty(m, spec.n, dtype=spec.out) if out is None else out
    if m == 0:
        return y
    if given.x.is_cuda:
        schedule.check(spec, capability(given.x.device))
    programs = grid(spec, schedule, m)
    if schedule.split > 1 and workspace is None:
        kind = torch.int32 if sums_are_integers(spec, schedule) else torch.float32
        sums = given.x.new_empty(workspace_size(spec, schedule, m), dtype=kind)
        workspace = (sums, locks(given.x.device, programs[0] * programs[2]))
    found = values(spec, schedule, given, y, workspace, plain=plain)
    kernel(spec, schedule, plain)[programs](**found, **options(schedule))
    return y


def workspace_size(spec: GemmSpec, schedule: Schedule, m: int) -> int:
    """Numbers that the parts of a split hold until they are added up."""
    return schedule.split * spec.weights * m * spec.n


@lru_cache(maxsize=64)
def capability(device: torch.device) -> int:
    """Compute capability: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def options(schedule: Schedule) -> dict[str, Any]:
    """What the compiler is told beside the source."""
    overlap = {"launch_pdl": True} if schedule.overlap else {}
    return {"num_warps": schedule.warps, "num_stages": schedule.stages, **overlap}


def warm(spec: GemmSpec, schedule: Schedule, parts: Sequence[Tensor]) -> None:
    """Compiles the kernel into Triton's cache without running it; `parts` of one weight, may be on `meta`."""

    def empty(*shape: int, dtype: torch.dtype = spec.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs = [empty(2, spec.k, dtype=spec.dtype if spec.activation is None else torch.uint8)]
    if spec.activation is not None:
        inputs.append(spec.activation.quantize(torch.zeros(2, spec.k)).parts[1].to("meta"))
    inputs += [empty(max(spec.experts, 1), dtype=torch.int32)] if spec.experts else []
    inputs += [*parts] * spec.weights + [empty(spec.n)] * (spec.weights * spec.bias)
    inputs += [empty(2, spec.n)] * spec.epilogue.count("e") + [empty(spec.n)] * spec.epilogue.count("v")
    sums = torch.int32 if sums_are_integers(spec, schedule) else torch.float32
    room = (empty(1, dtype=sums), empty(1, dtype=torch.int32)) if schedule.split > 1 else None
    y = empty(2, spec.n, dtype=spec.out)
    found = values(spec, schedule, spec.inputs(inputs), y, room, plain=False)
    types = {name: value.dtype if isinstance(value, Tensor) else value for name, value in found.items()}
    # Triton stands tensors in for dtypes among positional arguments only.
    ordered = [types[name] for name in arguments(spec, schedule, False)]
    kernel(spec, schedule).warmup(*ordered, grid=(1,), **options(schedule))
