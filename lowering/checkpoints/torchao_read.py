"""torchao read: tensor subclasses taken apart into codes and scales.

In: a folder that `save_pretrained` wrote, or a state dict in a file (`torch.save(model.state_dict())`). Out:
a `Checkpoint`. torchao itself puts its tensors together; what is in them is kept as it is.

    up.weight: Int8Tensor(qdata int8 [N, K], scale f32 [N, 1], activations PerRow)
    ->  stored["up.weight"] = Stored(Quantized(int8, ..), input="int8")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...formats import BitfoldError, Quantized, format
from ...formats.scale import STORED
from ..files.paths import FileError
from .checkpoint import Checkpoint, Stored
from .folder import Folder

_SCALES = {dtype: name for name, dtype in STORED.items()}
_MICRO = {torch.float8_e4m3fn: "mxfp8", torch.float8_e5m2: "mxfp8_e5m2", torch.float4_e2m1fn_x2: "mxfp4"}

Read = tuple[Quantized, str, tuple[Tensor, ...]]
"""The weight, the format of the activations, and their static scale and zero point."""


def read_torchao_folder(folder: Folder, *, activations: bool = True) -> Checkpoint:
    """Raises BitfoldError, naming the weight, for a tensor that is not kept here."""
    support = _torchao("torchao.prototype.safetensors.safetensors_support")
    metadata: dict[str, str] = {}
    for path in sorted(folder.path.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as opened:
            metadata |= opened.metadata() or {}
    try:
        tensors, left = support.unflatten_tensor_state_dict(dict(folder.tensors), metadata)
    except (KeyError, ValueError, TypeError) as error:
        raise FileError(f"{folder.path} is no torchao checkpoint, or a damaged one ({error})") from error
    return _checkpoint(str(folder.path), {**tensors, **left}, folder.dtype, activations)


def read_torchao_file(path: Path, *, activations: bool = True) -> Checkpoint:
    """A state dict in a file, read without running code of it: torchao's classes alone are allowed."""
    _torchao("torchao.quantization")
    _torchao("torchao.prototype.mx_formats.mx_tensor")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling gives many kinds
        first = str(error).strip().split("\n")[0]
        raise FileError(
            f"{path} is no state dict that torch.load reads with weights_only ({first})"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(one, Tensor) for one in found.values()):
        raise FileError(f"{path} holds a {type(found).__name__} and not a state dict of tensors")
    return _checkpoint(str(path), found, None, activations)


def _torchao(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BitfoldError("a torchao checkpoint is read by torchao: run `pip install torchao`") from error


def _checkpoint(
    source: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, activations: bool
) -> Checkpoint:
    plain: dict[str, Tensor] = {}
    stored: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        kind = type(tensor).__name__
        if type(tensor) in (Tensor, torch.nn.Parameter):
            plain[name] = tensor.detach()
            continue
        if kind not in _READERS:
            raise BitfoldError(f"{source}: {name} is a {kind}; read are {', '.join(_READERS)}")
        try:
            weight, given, params = _READERS[kind](tensor)
        except BitfoldError as error:
            raise BitfoldError(f"{source}, {name}: {error}") from error
        stored[name] = Stored(weight, given, params) if activations else Stored(weight)
        dtype = dtype or tensor.dtype
    if not stored:
        raise BitfoldError(f"{source} has no quantized tensor in it; load it by its own means")
    return Checkpoint(source, plain, stored, dtype)


def _integers(t: Any) -> Read:
    """Int8Tensor and IntxUnpackedToInt8Tensor: one code a byte."""
    if getattr(t, "act_pre_scale", None) is not None:
        raise BitfoldError(
            "its input is multiplied by a scale first (act_pre_scale), which no layer here does"
        )
    bits = int(str(getattr(t, "target_dtype", torch.int8)).removeprefix("torch.int"))
    zeros = t.zero_point
    if zeros is not None and zeros.is_floating_point() and bool(zeros.any()):
        raise BitfoldError("its zero points are floats in units of a code, which no format has")
    symmetric = zeros is None or not bool(zeros.any())
    grain = _grain(t.block_size, t.shape)
    fmt = format(f"int{bits}[{grain},{_scale_name(t.scale)}{'' if symmetric else ',zero'}]")
    codes = fmt.pack((t.qdata.view(torch.uint8) & ((1 << bits) - 1)).contiguous())
    params = {} if symmetric else {"zeros": _like_scales(fmt, zeros, t.shape)}
    weight = Quantized(fmt, t.shape[-1], codes, _like_scales(fmt, t.scale, t.shape), **params)
    given = getattr(t, "activation_quantization", None)
    if given is not None:
        if given != "int8_asym_per_token":
            raise BitfoldError(f"its activations are {given!r}, which is not read; give activations=False")
        return weight, "int8[zero]", ()
    return weight, *_integer_activations(t)


def _integer_activations(t: Any) -> tuple[str, tuple[Tensor, ...]]:
    kwargs = getattr(t, "act_quant_kwargs", None)
    if kwargs is None:
        return "", ()
    asymmetric = kwargs.mapping_type.name == "ASYMMETRIC"
    grain = _granularity(kwargs.granularity)
    items = [item for item in (grain, "zero" if asymmetric else "") if item]
    scale = t.act_quant_scale
    if scale is None:
        return str(format(f"int8[{','.join(items)}]")), ()
    if grain != "tensor" or scale.numel() != 1:
        raise BitfoldError(
            "its activations have static scales of more than one number; give activations=False"
        )
    text = str(format(f"int8[{','.join([*items, _scale_name(scale)])}]"))
    return text, (scale, t.act_quant_zero_point.to(torch.int8)) if asymmetric else (scale,)


def _int4(t: Any) -> Read:
    """Int4Tensor: value = code * scale + zero with signed codes, the even one in the low half of a byte."""
    if t.act_pre_scale is not None or t.activation_dtype is not torch.bfloat16:
        raise BitfoldError("its activations are scaled or quantized inside its kernel, which is not read")
    group = int(t.block_size[-1])
    symmetric = not bool(t.zero_point.any())
    scales, zeros = t.scale.mT.contiguous(), t.zero_point.mT.contiguous()
    name = _scale_name(scales)
    codes = t.qdata.view(torch.uint8)
    if symmetric:
        fmt = format(f"int4[g{group},{name}]")
        return Quantized(fmt, t.shape[-1], codes, scales), "", ()
    fmt = format(f"uint4[g{group},{name},zero:float]")
    return Quantized(fmt, t.shape[-1], codes ^ 0x88, scales, zeros), "", ()


def _float8(t: Any) -> Read:
    element = str(t.qdata.dtype).removeprefix("torch.")
    grain = _grain(t.block_size, t.shape)
    fmt = format(f"{element}[{grain},{_scale_name(t.scale)}]")
    scales = _like_scales(fmt, t.scale, t.shape)
    weight = Quantized(fmt, t.shape[-1], t.qdata.contiguous().view(torch.uint8), scales)
    kwargs = t.act_quant_kwargs
    if kwargs is None:
        return weight, "", ()
    if kwargs.hp_value_lb is not None or kwargs.hp_value_ub is not None:
        raise BitfoldError(
            "its activations' scales are bounded (hp_value_lb, hp_value_ub), which is not read"
        )
    given = str(kwargs.float8_dtype).removeprefix("torch.")
    return weight, str(format(f"{given}[{_granularity(kwargs.granularity)}]")), ()


def _micro(t: Any) -> Read:
    """MXTensor."""
    if t.elem_dtype not in _MICRO or t.block_size != 32:
        raise BitfoldError(f"MX blocks of {t.block_size} {t.elem_dtype} are not read")
    rows, k = t.shape
    scales = _unswizzled(t, t.scale.view(torch.uint8), rows, k // 32)
    fmt = format(_MICRO[t.elem_dtype])
    weight = Quantized(fmt, k, t.qdata.contiguous().view(torch.uint8), scales)
    kwargs = t.act_quant_kwargs
    if kwargs is None:
        return weight, "", ()
    return weight, str(format(f"{_MICRO[kwargs.elem_dtype]}[{kwargs.scaling_mode.value}]")), ()


def _nvfp4(t: Any) -> Read:
    rows, k = t.shape
    scales = _unswizzled(t, t.scale.view(torch.uint8), rows, k // 16).view(torch.float8_e4m3fn)
    two = t.per_tensor_scale is not None
    fmt = format("nvfp4" if two else "nvfp4[one_level]")
    level = {"tensor_scale": t.per_tensor_scale.float().reshape(1, 1)} if two else {}
    weight = Quantized(fmt, k, t.qdata.contiguous().view(torch.uint8), scales, **level)
    kwargs = t.act_quant_kwargs
    if kwargs is None:
        return weight, "", ()
    if t.act_per_tensor_scale is not None:
        raise BitfoldError("its activations have one static scale above dynamic ones; give activations=False")
    return weight, "nvfp4" if kwargs.use_dynamic_per_tensor_scale else "nvfp4[one_level]", ()


def _unswizzled(t: Any, scales: Tensor, rows: int, groups: int) -> Tensor:
    if not t.is_swizzled_scales:
        return scales.reshape(rows, groups).contiguous()
    utils = _torchao("torchao.prototype.mx_formats.utils")
    return utils.from_blocked(scales.reshape(-1), rows, groups).contiguous()  # type: ignore[no-any-return]


def _grain(block: Any, shape: torch.Size) -> str:
    """The granularity of blocks of these sizes; an empty list is the whole tensor."""
    if len(shape) != 2:
        raise BitfoldError(f"a quantized weight is 2-D here, not {list(shape)}")
    if not block:
        return "tensor"
    rows, cols = (int(size) for size in block)
    if (rows, cols) == tuple(shape):
        return "tensor" if shape[0] != 1 else "row"
    if rows == 1:
        return "row" if cols == shape[-1] else f"g{cols}"
    return f"{rows}x{cols}"


def _granularity(given: Any) -> str:
    name = type(given).__name__
    if name in ("PerRow", "PerToken"):
        return "row"
    if name == "PerTensor":
        return "tensor"
    if name == "PerGroup":
        return f"g{given.group_size}"
    if name == "PerBlock" and len(given.block_size) == 2 and given.block_size[0] == 1:
        return f"g{given.block_size[1]}"
    raise BitfoldError(f"its activations have scales {given}, which no format has; give activations=False")


def _scale_name(scales: Tensor) -> str:
    if scales.dtype not in _SCALES:
        raise BitfoldError(f"scales are {scales.dtype}, and formats have {', '.join(map(str, _SCALES))}")
    return _SCALES[scales.dtype]


def _like_scales(fmt: Any, part: Tensor, shape: torch.Size) -> Tensor:
    wanted = fmt.scale.granularity.scales_shape(tuple(shape))
    if part.numel() != torch.Size(wanted).numel():
        raise BitfoldError(f"a part is {list(part.shape)} and {fmt} of {list(shape)} has {list(wanted)}")
    return part.reshape(wanted).contiguous()


_READERS: dict[str, Callable[[Any], Read]] = {
    "Int8Tensor": _integers,
    "IntxUnpackedToInt8Tensor": _integers,
    "Int4Tensor": _int4,
    "Float8Tensor": _float8,
    "MXTensor": _micro,
    "NVFP4Tensor": _nvfp4,
}
