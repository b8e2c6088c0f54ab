"""The formats as operators, so that they trace, export, compile and save.

In: tensors and the text of a format. Out: tensors; a `Quantized` travels as the list of its parts.

    torch.ops.bitfold.quantize(w, "int4[g128]")               -> [codes, scales]
    torch.ops.bitfold.dequantize([codes, scales], "int4[g128]", k, torch.float32)  -> w'

They are CompositeImplicitAutograd: one node in a pre-dispatch graph (export's training IR, make_fx), and
plain torch below it, which fakes, autograd and Inductor take apart by themselves. Nothing in them looks at
data.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cache_tag
from .batched import one_by_one
from .errors import FormatError
from .format import Quantized
from .text import format

# torch.library is untyped.
_library: Any = torch.library.Library("bitfold", "FRAGMENT")  # type: ignore[no-untyped-call]

SCHEMAS = {
    "quantize": "(Tensor x, str format, Tensor[]? params=None) -> Tensor[]",
    "dequantize": "(Tensor[] parts, str format, SymInt k, ScalarType dtype) -> Tensor",
    "fake_quantize": "(Tensor x, str format, Tensor[]? params=None) -> Tensor",
    "pack": "(Tensor codes, str format) -> Tensor",
    "unpack": "(Tensor packed, str format, SymInt k) -> Tensor",
    "choose": "(Tensor x, str format) -> Tensor[]",
    "no_gradient": "(Tensor gradient, SymInt[] shape, ScalarType dtype, str format) -> Tensor",
}


def quantize(x: Tensor, text: str, params: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Parts of x [..., K] in the order of `format.parts`; `params` are static scales, or none.

    Codes are integers, so nothing goes back through them: asking for x's gradient raises when it is computed.
    """
    tracked = torch.is_grad_enabled() and x.requires_grad
    parts = format(text).quantize(x.detach() if tracked else x, params or None).parts
    if not tracked:
        return parts
    carrier = next((i for i, part in enumerate(parts) if part.is_floating_point()), None)
    if carrier is None:  # a tensor of bytes cannot say that it needs a gradient
        warnings.warn(f"{no_gradient_text(text)}, and what is before it gets none", stacklevel=2)
        return parts
    parts[carrier] = _NoGradient.apply(x, parts[carrier], text)  # type: ignore[no-untyped-call]
    return parts


class _NoGradient(torch.autograd.Function):
    """(x, scales) -> scales, and an error in place of x's gradient: the scales' part alone would be wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, text: str) -> Tensor:
        ctx.like, ctx.text = (x.shape, x.dtype), text
        return scales.view_as(scales)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        shape, dtype = ctx.like
        (gradient,) = gradients
        wanted = torch.ops.bitfold.no_gradient(gradient, list(shape), dtype, ctx.text)
        return wanted, gradient, None


def no_gradient_text(text: str) -> str:
    """The start of the sentence for somebody who trains through codes."""
    return f"no gradient goes through a tensor quantized to {text}"


def no_gradient(gradient: Tensor, shape: Sequence[int], dtype: torch.dtype, text: str) -> Tensor:
    """Raises. An operator, so that a compiled forward may hold it in a backward that never runs."""
    raise FormatError(
        f"{no_gradient_text(text)}; train on a recipe that leaves activations alone, such as int8 or "
        "int4, or with the pass fake_quantize, whose gradient goes straight through"
    )


def _no_gradient_shape(gradient: Tensor, shape: Sequence[int], dtype: torch.dtype, text: str) -> Tensor:
    return gradient.new_empty(shape, dtype=dtype)


def dequantize(parts: Sequence[Tensor], text: str, k: int, dtype: torch.dtype) -> Tensor:
    """The values [..., k] in `dtype`."""
    return Quantized.from_parts(format(text), parts, k).dequantize(dtype)


def fake_quantize(x: Tensor, text: str, params: Sequence[Tensor] | None = None) -> Tensor:
    """dequantize(quantize(x)) in x's dtype, with the gradient of the identity (straight-through)."""
    with torch.no_grad():
        rounded = format(text).fake_quantize(x, params or None)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    # x - x.detach() is 0 with gradient 1: the value stays bit for bit, which x + (rounded - x) would not.
    return rounded + (x - x.detach())


def pack(codes: Tensor, text: str) -> Tensor:
    """Unpacked codes -> bytes in the format's layout."""
    return format(text).pack(codes)


def unpack(packed: Tensor, text: str, k: int) -> Tensor:
    """Bytes in the format's layout -> unpacked codes."""
    return format(text).unpack(packed, k)


def choose(x: Tensor, text: str) -> list[Tensor]:
    """[scales, zeros?, tensor_scale?] from the data x."""
    return list(format(text).choose(x))


for _function in (quantize, dequantize, fake_quantize, pack, unpack, choose):
    _library.define(_function.__name__ + SCHEMAS[_function.__name__])
    _library.impl(_function.__name__, _function, "CompositeImplicitAutograd")
    _op = getattr(torch.ops.bitfold, _function.__name__).default
    torch.library.register_vmap(_op, one_by_one(_op), lib=_library)

_library.define("no_gradient" + SCHEMAS["no_gradient"])
_library.impl("no_gradient", no_gradient, "CompositeExplicitAutograd")
_library.impl("no_gradient", _no_gradient_shape, "Meta")

cache_tag.add(cache_tag.sources())
