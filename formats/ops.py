"""The formats as operators, so that they trace, export, compile and save.

In: tensors and the text of a format. Out: tensors; a `Quantized` travels as the list of its parts.

    torch.ops.bitfold.quantize(w, "int4[g128]")               -> [codes, scales]
    torch.ops.bitfold.dequantize([codes, scales], "int4[g128]", k, torch.float32)  -> w'

They are CompositeImplicitAutograd: one node in a pre-dispatch graph (export's training IR, make_fx), and
plain torch below it, which fakes, autograd and Inductor take apart by themselves. Nothing in them looks at
data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cache_tag
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
}


def quantize(x: Tensor, text: str, params: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Parts of x [..., K] in the order of `format.parts`; `params` are static scales, or none."""
    return format(text).quantize(x, params or None).parts


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

cache_tag.add(cache_tag.sources())
