"""The arguments of a generated kernel: their names and types, and the tensors of a call by these names.

In: a spec and a schedule; a call's tensors. Out: what the kernel's signature, its launch, its compilation
without a GPU and its warming all agree on.

    linear 4096x4096 bf16 int4[g128,halves256] -> add(y0,e0)
    ->  x, codes, scales, e0, y, m, x_stride, SN, SG

A second weight's arguments end in `_b`, a third's in `_c`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...formats import Element, Integer, Quantized, Scale
from ..schedule import Schedule
from ..spec import GemmSpec, Inputs, type_name
from .lines import POINTERS
from .values import needs_table

SUFFIXES = ("", "_b", "_c", "_d")


def sums_are_integers(spec: GemmSpec, schedule: Schedule) -> bool:
    """Whether what a split adds up are int32: the sums of int8 products, scaled when they are complete."""
    return spec.lane == "int8" and schedule.scale == "end" and not spec.has_offset


def reads_bytes(spec: GemmSpec) -> bool:
    """Whether codes are lanes as they lie, so that they are loaded as such."""
    return spec.lane == "e4m3" and spec.weight.element.bits == 8


@lru_cache(maxsize=1024)
def arguments(spec: GemmSpec, schedule: Schedule, plain: bool) -> dict[str, str]:
    """Name -> type, in the order of the signature. `plain`: float8 numbers come as bytes."""
    lanes = "u8" if plain and spec.lane == "e4m3" else spec.lane
    found = {"x": lanes}
    if spec.activation is not None:
        assert spec.activation.scale is not None
        found["x_scales"] = _stored(spec.activation.scale)
    if spec.experts:
        found["ends"] = "i32"
    unit = "i16" if spec.activation is None else (lanes if reads_bytes(spec) else "int8")
    for suffix in SUFFIXES[: spec.weights]:
        found |= {name + suffix: kind for name, kind in _weight(spec, unit).items()}
    if needs_table(spec.weight.element):
        found["table"] = "f32"
    if spec.bias:
        found |= {"bias" + suffix: spec.x for suffix in SUFFIXES[: spec.weights]}
    found |= dict.fromkeys(extra_names(spec).values(), spec.x)
    found["y"] = type_name(spec.out) or ""
    if schedule.split > 1:
        found |= {"partial": "i32" if sums_are_integers(spec, schedule) else "f32", "locks": "i32"}
    types = {name: POINTERS[kind] for name, kind in found.items()} | {"m": "i32", "x_stride": "i32"}
    constants = ["SN", "SG"] if spec.weight.scale is not None else []
    constants += ["SE"] if constants and spec.experts else []
    return types | dict.fromkeys(constants, "constexpr")


def extra_names(spec: GemmSpec) -> dict[str, str]:
    """What the epilogue reads -> the argument: matrix0 for e0, vector0 for v0."""
    words = {"e": "matrix", "v": "vector"}
    return {
        f"{kind}{i}": f"{word}{i}" for kind, word in words.items() for i in range(spec.epilogue.count(kind))
    }


def _weight(spec: GemmSpec, unit: str) -> dict[str, str]:
    scale = spec.weight.scale
    found = {"codes": unit}
    if scale is not None:
        found["scales"] = _stored(scale)
        if scale.zero != "none":
            found["zeros"] = _stored(scale) if scale.zero != "int" else _whole(spec.weight.element)
        if scale.two_level:
            found["level"] = "f32"
    return found


def _whole(element: Element) -> str:
    """Of integer zero points: the kind of integer that the element is."""
    return "int8" if isinstance(element, Integer) and element.signed else "u8"


def _stored(scale: Scale) -> str:
    """Scales of 8 bits are bytes to Triton, which has the one type nowhere and the other on few GPUs."""
    return "u8" if scale.dtype in ("e8m0", "e4m3") else scale.dtype


@lru_cache(maxsize=64)
def table(spec: GemmSpec, device: torch.device) -> Tensor:
    """A codebook's values, float32, in the device's memory."""
    return torch.tensor(spec.weight.element.values(), dtype=torch.float32, device=device)


def values(
    spec: GemmSpec,
    schedule: Schedule,
    given: Inputs,
    y: Tensor,
    workspace: tuple[Tensor, Tensor] | None,
    *,
    plain: bool,
) -> dict[str, Any]:
    """Name -> tensor or number, for a call on checked tensors."""
    found: dict[str, Any] = {"x": given.x if spec.activation is None else _lanes(spec, given.x, plain)}
    if given.x_scales is not None:
        found["x_scales"] = stored_bytes(given.x_scales)
    if given.ends is not None:
        found["ends"] = given.ends
    strides: tuple[int, ...] = ()
    for suffix, parts in zip(SUFFIXES, given.parts, strict=False):
        q = Quantized.from_parts(spec.weight, parts, spec.k)
        found["codes" + suffix] = _units(spec, q.codes, plain)
        if q.scales is not None:
            found["scales" + suffix] = stored_bytes(q.scales)
            strides = q.scales.stride()
        if q.zeros is not None:
            found["zeros" + suffix] = q.zeros
        if q.tensor_scale is not None:
            found["level" + suffix] = q.tensor_scale
    if needs_table(spec.weight.element):
        found["table"] = table(spec, given.x.device)
    found |= {"bias" + suffix: bias for suffix, bias in zip(SUFFIXES, given.biases, strict=False)}
    found |= dict(zip(extra_names(spec).values(), given.extras, strict=True)) | {"y": y}
    if schedule.split > 1:
        assert workspace is not None
        found["partial"], found["locks"] = workspace
    found |= {"m": given.x.shape[0], "x_stride": given.x.stride(0)}
    if spec.weight.scale is not None:
        found |= {"SN": strides[-2] if len(strides) > 1 else 0, "SG": strides[-1] if len(strides) > 1 else 0}
        found |= {"SE": strides[0] if len(strides) > 2 else 0} if spec.experts else {}
    return found


def stored_bytes(scales: Tensor) -> Tensor:
    """Scales as the kernels take them."""
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales


def _units(spec: GemmSpec, codes: Tensor, plain: bool) -> Tensor:
    if spec.activation is None:
        return codes.view(torch.int16)
    if not reads_bytes(spec):
        return codes.view(torch.int8)
    return _lanes(spec, codes, plain)


def _lanes(spec: GemmSpec, codes: Tensor, plain: bool) -> Tensor:
    """Codes, a byte each, as what the tensor cores multiply; the interpreter decodes float8 from bytes."""
    if spec.lane == "int8":
        return codes.view(torch.int8)
    return codes.view(torch.uint8 if plain else torch.float8_e4m3fn)
