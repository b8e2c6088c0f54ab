"""Weights rounded by other people's code: what bitfold's recipes are held against.

In: a float32 weight [N, K]. Out: the same weight after rounding to a format and back, float32, by torchao's
primitives, or by a search for the nearest value in float64. No bitfold runs here.

    ORACLES["int4[g32,f32]"](w)  ->  w through torchao's choose_qparams_affine, quantize_affine and back
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Rounding = Callable[[Tensor], Tensor]

# NF4 as QLoRA prints it (arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def integers(
    w: Tensor, *, bits: int, group: int | None = None, scale: torch.dtype = torch.float32, zero: bool = False
) -> Tensor:
    """torchao's affine integers: symmetric and signed, or unsigned with an integer zero point."""
    from torchao.quantization import quant_primitives as ao

    block = (1, group or w.shape[-1])
    low, high = (0, (1 << bits) - 1) if zero else (-(1 << bits - 1), (1 << bits - 1) - 1)
    dtype = torch.uint8 if zero else torch.int8
    mapping = ao.MappingType.ASYMMETRIC if zero else ao.MappingType.SYMMETRIC
    scales, zeros = ao.choose_qparams_affine(w, mapping, block, dtype, low, high)
    scales = scales.to(scale).float()
    codes = ao.quantize_affine(w, block, scales, zeros, dtype, low, high)
    return ao.dequantize_affine(codes, block, scales, zeros, dtype, low, high)  # type: ignore[no-any-return]


def float8(w: Tensor) -> Tensor:
    """torchao's e4m3 with a scale for each row."""
    from torchao.quantization import quant_primitives as ao

    scales = ao._choose_scale_float8(w, [1, w.shape[-1]], torch.float8_e4m3fn)
    return ao._dequantize_affine_float8(ao._quantize_affine_float8(w, scales), scales)  # type: ignore[no-any-return]


def mx(w: Tensor, *, element: str) -> Tensor:
    """torchao's OCP MX blocks, scales rounded down."""
    from torchao.prototype.mx_formats import mx_tensor as ao

    kinds = {
        "e4m3": torch.float8_e4m3fn,
        "e2m3": ao.DTYPE_FP6_E2M3,
        "e2m1": torch.float4_e2m1fn_x2,
    }
    scales, data = ao.to_mx(w, kinds[element], 32, ao.ScaleCalculationMode.FLOOR)
    return ao.to_dtype(data, scales, kinds[element], 32, torch.float32)  # type: ignore[no-any-return]


def nvfp4(w: Tensor) -> Tensor:
    """torchao's NVFP4 with a scale for the tensor above those of the blocks."""
    from torchao.prototype.mx_formats import nvfp4_tensor as ao
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4

    whole = ao.per_tensor_amax_to_scale(w.abs().amax())
    scales, data = ao.nvfp4_quantize(w, 16, whole)
    values = f4_unpacked_to_f32(unpack_uint4(data)).view(w.shape[0], -1, 16)
    return (values * (scales.float().view(w.shape[0], -1, 1) * whole)).view(w.shape)


def codebook(w: Tensor, *, levels: tuple[float, ...], group: int, scale: torch.dtype) -> Tensor:
    """The level nearest in float64, by trying all of them; a scale is the group's largest magnitude, and a
    number in units of it is a float32, which decides the few that lie halfway."""
    blocks = w.view(w.shape[0], -1, group)
    scales = blocks.abs().amax(-1, keepdim=True).to(scale).float()
    wanted = torch.where(scales > 0, blocks * (1 / scales), 0.0).double()
    best, nearest = torch.full_like(wanted, float("inf")), torch.zeros_like(wanted)
    for level in torch.tensor(levels, dtype=torch.float32).double().tolist():
        off = (wanted - level).abs()
        nearest = torch.where(off < best, level, nearest)
        best = torch.minimum(best, off)
    return (nearest * scales.double()).float().view(w.shape)


ORACLES: dict[str, Rounding] = {
    "int8": partial(integers, bits=8),
    "int8[g64,f32]": partial(integers, bits=8, group=64),
    "int4[row]": partial(integers, bits=4),
    "int4[g32,f32]": partial(integers, bits=4, group=32),
    "int4[g64,f32]": partial(integers, bits=4, group=64),
    "int4[g64]": partial(integers, bits=4, group=64, scale=torch.bfloat16),
    "uint4[g32,f32,zero]": partial(integers, bits=4, group=32, zero=True),
    "fp8": float8,
    "mxfp8": partial(mx, element="e4m3"),
    "mxfp6": partial(mx, element="e2m3"),
    "mxfp4": partial(mx, element="e2m1"),
    "nvfp4": nvfp4,
    "nf4": partial(codebook, levels=NF4, group=64, scale=torch.bfloat16),
}
"""Recipe -> rounding of the linear layers; the head and the embedding stay as they are."""


def round_linears(model: Any, rounding: Rounding) -> None:
    """Replace the weight of every linear layer except the head by its rounded value, in place."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            module.weight = nn.Parameter(rounding(module.weight.data), requires_grad=False)


def round_everything(model: Any, rounding: Rounding) -> None:
    """The embedding too, and the head that is tied to it."""
    round_linears(model, rounding)
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(rounding(table.weight.data), requires_grad=False)
    model.get_output_embeddings().weight = table.weight


def round_tokens(model: Any, rounding: Rounding) -> None:
    """Round the input of every linear layer except the head, a scale for each token, in each call."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        return (rounding(x.reshape(-1, x.shape[-1])).view(x.shape), *args[1:])

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            module.register_forward_pre_hook(hook)


def prepared(model: Any, recipe: str) -> None:
    """Change `model` to what the oracle makes of `recipe`. KeyError for a recipe without an oracle.

    `none` and `stored` change nothing: the model holds what the gguf package decodes from the file.
    """
    if recipe in ("none", "stored"):
        return
    if recipe == "int8_all":
        round_everything(model, ORACLES["int8"])
    elif recipe == "int8_dynamic":
        round_linears(model, ORACLES["int8"])
        round_tokens(model, ORACLES["int8"])
    elif recipe == "fp8_dynamic":
        round_linears(model, float8)
        round_tokens(model, float8)
    else:
        round_linears(model, ORACLES[recipe])


RECIPES = ("none", "stored", *ORACLES, "int8_all", "int8_dynamic", "fp8_dynamic")
