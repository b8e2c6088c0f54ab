"""compressed-tensors' way to say what a number is, and bitfold's: one to the other, both ways.

In: `{"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}` and the dtype
of the scales. Out: `int4[g128]`; and back, with the name of the way in which such weights are stored.

    int4[g128]                   weights int 4 group 128 symmetric                 pack-quantized
    int4[g128,zero]              the same, not symmetric                           pack-quantized
    int8 with int8 activations   weights int 8 channel, input int 8 token dynamic  int-quantized
    float8_e4m3fn[128x128,bf16]  weights float 8 block [128, 128]                  naive-quantized
    nvfp4, mxfp4, mxfp6_e2m3, mxfp8                                                the formats of those names
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...formats import BitfoldError, Format, format
from ...formats.integer import Integer
from ...formats.scale import STORED
from ...formats.sparsity import Dense

_FLOATS = {8: "float8_e4m3fn", 6: "float6_e2m3", 4: "float4_e2m1"}
_SCALES = {dtype: name for name, dtype in STORED.items()}


def weight_format(args: Mapping[str, Any], scales: torch.dtype) -> Format:
    """The format of weights under these arguments. Raises BitfoldError for what none has."""
    return _format(args, _grain(args), scales)


def activation_format(args: Mapping[str, Any], scales: torch.dtype | None) -> Format:
    """The format of activations; `scales`: the dtype of static ones, None if they are chosen in each call."""
    if args.get("dynamic") == "local":
        raise BitfoldError(
            "activations are asked for in blocks with dynamic scales under one static scale a tensor, which "
            "no format has; give activations=False to load the weights alone"
        )
    micro = str(args.get("scale_dtype")) == "torch.uint8"
    return _format(args, _grain(args), scales or (torch.uint8 if micro else torch.float32))


def _format(args: Mapping[str, Any], grain: str, scales: torch.dtype) -> Format:
    bits, kind = args.get("num_bits", 8), args.get("type", "int")
    if kind == "float" and bits in _FLOATS:
        element = _FLOATS[bits]
    elif kind == "int" and isinstance(bits, int) and 2 <= bits <= 8:
        element = f"int{bits}"
    else:
        raise BitfoldError(f"compressed-tensors names {kind} of {bits} bits, which no format here holds")
    if scales not in _SCALES:
        raise BitfoldError(f"scales are {scales}, and formats have {', '.join(map(str, _SCALES))}")
    items = [grain, _SCALES[scales]]
    if not args.get("symmetric", True):
        items.append("zero")
    if args.get("strategy") == "tensor_group":
        items.append("two_level")
    return format(f"{element}[{','.join(items)}]")


def _grain(args: Mapping[str, Any]) -> str:
    strategy, size = args.get("strategy"), args.get("group_size")
    if strategy is None:  # as the library itself fills it in
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        return "tensor"
    if strategy in ("channel", "token"):
        return "row"
    if strategy in ("group", "tensor_group") and isinstance(size, int) and size > 0:
        return f"g{size}"
    block = args.get("block_structure")
    if strategy == "block" and isinstance(block, list | tuple) and len(block) == 2:
        return f"{block[0]}x{block[1]}"
    raise BitfoldError(
        f"compressed-tensors' strategy {strategy!r} (group_size {size}, block_structure {block}) says no "
        "granularity that a format has"
    )


def weight_args(fmt: Format) -> dict[str, Any]:
    """The arguments that say `fmt`. Raises BitfoldError, naming what they cannot say."""
    return _args(fmt) | {"dynamic": False}


def activation_args(fmt: Format, *, static: bool) -> dict[str, Any]:
    """The arguments of activations in `fmt`, static or chosen in each call."""
    args = _args(fmt)
    if args["strategy"] == "channel":
        args["strategy"] = "token"
    if args["strategy"] in ("block", "tensor_group"):
        raise BitfoldError(f"compressed-tensors has no activations in {fmt}; take one scale a token or group")
    return args | {"dynamic": not static}


def _args(fmt: Format) -> dict[str, Any]:
    scale, element = fmt.scale, fmt.element
    unsigned = isinstance(element, Integer) and not element.signed
    if scale is None or not isinstance(fmt.sparsity, Dense):
        raise _unsaid(fmt, "it holds dense weights with scales")
    if scale.zero not in ("none", "int") or (unsigned and scale.zero == "none"):
        raise _unsaid(fmt, "its zero points are integers, and codes without one are signed")
    if isinstance(element, Integer) and element.fraction == 0 and element.bits >= 2:
        kind = "int"
    elif element.name in _FLOATS.values():
        kind = "float"
    else:
        raise _unsaid(fmt, f"its numbers are int2 to int8, {', '.join(_FLOATS.values())}")
    micro, two = scale.dtype == "e8m0", scale.dtype == "e4m3"
    pair = (element.name, scale.granularity.cols, scale.two_level)
    if (micro and (kind, scale.granularity.cols) != ("float", 32)) or (
        two and pair != ("float4_e2m1", 16, True)
    ):
        raise _unsaid(fmt, "E8M0 scales go with floats in groups of 32 and E4M3 ones with NVFP4")
    if kind == "float" and element.bits < 8 and not (micro or two):
        raise _unsaid(fmt, "floats below 8 bits are NVFP4 or MX there")
    args: dict[str, Any] = {"num_bits": element.bits, "type": kind, "symmetric": scale.zero == "none"}
    grain = scale.granularity
    if grain.cols is None:
        args["strategy"] = "tensor" if grain.rows is None else "channel"
    elif grain.is_block:
        args |= {"strategy": "block", "block_structure": [grain.rows, grain.cols]}
    else:
        args |= {"strategy": "tensor_group" if two else "group", "group_size": grain.cols}
    if micro or two:
        args["scale_dtype"] = str(scale.stored)
    return args


def _unsaid(fmt: Format, why: str) -> BitfoldError:
    return BitfoldError(
        f"compressed-tensors cannot say {fmt}: {why}; save with bf.save, or quantize to a format that it has"
    )


def storage(fmt: Format, *, activations: bool) -> str:
    """The name of the way in which weights of `fmt` are stored, as the library itself would choose it."""
    scale, bits = fmt.scale, fmt.element.bits
    assert scale is not None
    if scale.dtype == "e8m0":
        return {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized", 8: "mxfp8-quantized"}[bits]
    if scale.two_level:
        return "nvfp4-pack-quantized"
    if isinstance(fmt.element, Integer):
        return "int-quantized" if activations else "pack-quantized"
    return "float-quantized" if activations else "naive-quantized"
