"""Products by torch's own library: of decoded weights, or of float8 codes.

They run where a table says that they are faster, and where no pipelined kernel can run and others are slower
(`choose.py`): float8 mostly on cards without pipelined kernels.

In: a spec, its inputs told apart. Out: which specs have such a product, and the product [M, n].

    linear 4096x4096 bf16 int4[g128,halves256]                   the weight decoded into memory, then cuBLAS
    linear 4096x4096 bf16 float8_e4m3fn[bytes] x:float8_e4m3fn   `_scaled_mm` on the codes as they lie

Sums are float32, as in our kernels: `_scaled_mm` is told not to add up with the tensor cores' fewer bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import Format, Quantized
from ..formats.sparsity import Dense
from .spec import NATIVE, CodegenError, GemmSpec

# What `_scaled_mm` asks of both sides of a weight, and the type that it writes with a scale a row.
MULTIPLE, WRITES = 16, torch.bfloat16
# Types of scales that float32 takes up without a loss.
PLAIN = ("f32", "bf16", "f16")


def has_library(spec: GemmSpec) -> bool:
    """Whether the library can take the kernel's place."""
    if spec.experts:
        return False
    return spec.activation is None or multiplies_codes(spec)


def multiplies_codes(spec: GemmSpec) -> bool:
    """Whether the library multiplies the codes of both sides as they lie."""
    if spec.activation is None or spec.experts or spec.lane != "e4m3":
        return False
    sides = (spec.weight, spec.activation)
    fits = spec.n % MULTIPLE == 0 and spec.k % MULTIPLE == 0 and spec.dtype == WRITES
    return fits and all(map(_as_it_lies, sides))


def _as_it_lies(side: Format) -> bool:
    """Codes of float8_e4m3fn in order, a scale a row or one for all."""
    scale = side.scale
    if NATIVE.get(side.element) != "e4m3" or side.layout.name != "bytes":  # type: ignore[call-overload]
        return False
    if scale is None or scale.dtype not in PLAIN or scale.zero != "none" or scale.two_level or scale.native:
        return False
    grain = scale.granularity
    return isinstance(side.sparsity, Dense) and grain.rows in (1, None) and grain.cols is None


def product(
    spec: GemmSpec, x: Tensor, x_scales: Tensor | None, parts: Sequence[Tensor], bias: Tensor | None = None
) -> Tensor:
    """x [M, k], or its codes, times one weight [n, k] transposed, plus a bias [n], in the spec's dtype.
    CodegenError if there is no such product."""
    if not has_library(spec):
        raise CodegenError(
            f"the library has no product for {spec}; run a schedule, as `choose` gives where `has_library` "
            "says no"
        )
    if spec.activation is None:
        from .triton.build import decode

        return torch.nn.functional.linear(x, decode(spec, parts, x), bias)
    assert x_scales is not None
    if x.shape[0] == 0:
        return x.new_empty(0, spec.n, dtype=spec.dtype)
    weight = Quantized.from_parts(spec.weight, parts, spec.k)
    assert weight.scales is not None
    of_weight = weight.scales.float().reshape(1, -1).expand(1, spec.n).contiguous()
    of_x = x_scales.float().reshape(-1, 1).expand(x.shape[0], 1).contiguous()
    rows, columns = (side.view(torch.float8_e4m3fn) for side in (x, weight.codes.view(spec.n, spec.k)))
    return torch._scaled_mm(
        rows, columns.t(), of_x, of_weight, bias=bias, out_dtype=spec.dtype, use_fast_accum=False
    )
