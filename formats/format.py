"""A format: element x scale x layout x sparsity, and the tensors it makes.

In: a float tensor [..., K]. Out: a `Quantized` (codes as the layout packs them, scales, what else the format
stores), and back.

    f = format("int4[g128]")
    q = f.quantize(w)                  w [N, K] -> q.codes uint8 [N, K/2], q.scales bfloat16 [N, K/128]
    f.dequantize(q)                    float32 [N, K]
    str(f)                             "int4[g128]"

Quantization runs along the last dimension; everything before it is rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from . import affine, rules
from .element import Element
from .errors import FormatError
from .granularity import Granularity
from .layout import Layout, default
from .pieces import by_rows
from .scale import LARGEST, Scale
from .sparsity import Dense, Sparsity


@dataclass(frozen=True)
class Format:
    """scale None stores bare codes (a cast). `layout` None means the default for the element's width."""

    element: Element
    scale: Scale | None
    layout: Layout = field(default=None)  # type: ignore[assignment]
    sparsity: Sparsity = field(default_factory=Dense)

    def __post_init__(self) -> None:
        layout = default(self.element.bits) if self.layout is None else self.layout
        if self.element.bits == 8 and layout.name in ("packed", "planar"):
            layout = default(8)  # at 8 bits these are the same bytes
        object.__setattr__(self, "layout", layout)
        if self.scale is not None:
            rules.check_rule(self.element, self.scale)
            self.sparsity.narrowed(self.scale.granularity)

    def __str__(self) -> str:
        from .text import to_text

        return to_text(self)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the stored tensors, in the order of every list of parts."""
        names = ["codes"]
        if self.scale is not None:
            names.append("scales")
            if self.scale.zero != "none":
                names.append("zeros")
            if self.scale.two_level:
                names.append("tensor_scale")
        if not isinstance(self.sparsity, Dense):
            names.append("indices")
        return tuple(names)

    @property
    def params_names(self) -> tuple[str, ...]:
        """Names of what `choose` gives: the parts that decode codes, in the order of the parts."""
        return tuple(name for name in self.parts if name not in ("codes", "indices"))

    @property
    def cols(self) -> int | None:
        """Numbers of a row that share a scale; None where all do, or there is none."""
        return self.scale.granularity.cols if self.scale is not None else None

    @property
    def run(self) -> int | None:
        """Stored codes in a group: what a planar layout takes apart; None for the whole row."""
        return self._granularity.cols

    @property
    def _granularity(self) -> Granularity:
        """The granularity of the stored codes: sparsity keeps some numbers of each group."""
        whole = self.scale.granularity if self.scale is not None else Granularity()
        return self.sparsity.narrowed(whole)

    @property
    def _rows(self) -> int | None:
        return self._granularity.rows

    def check(self, shape: Sequence[int]) -> None:
        """Raises FormatError, one sentence, if a tensor of this shape cannot take the format."""
        (self.scale.granularity if self.scale is not None else Granularity()).check(shape)
        self.sparsity.check(shape)

    def _check_numbers(self, x: Tensor) -> None:
        self.check(x.shape)
        if x.is_complex():
            raise FormatError(f"{self} holds real numbers, not {x.dtype}; quantize torch.view_as_real(x)")

    def holds(self, low: float, high: float, dtype: torch.dtype = torch.float32) -> bool:
        """Whether any tensor of `dtype` with numbers from `low` to `high` decodes to finite numbers, under
        scales that their own dtype holds. Elements may clip; that is their range, and not looked at.

        Above 2**100 no: the sums and spans of a block are computed in float32.
        """
        if max(-low, high) > 2.0**100:
            return False
        if self.scale is None or (max(-low, high) <= 128 and self.element.steps >= 1):
            return True  # every scale dtype reaches that far
        grain = self.scale.granularity
        for ends in ((low, high), (low, low), (high, high)):
            block = torch.tensor(ends, dtype=dtype).repeat(grain.rows or 1, (grain.cols or 16) // 2)
            scales = self.scale.decode(self.choose(block)[0])
            largest = math.inf if self.scale.two_level else LARGEST.get(self.scale.dtype, math.inf)
            if not (self.fake_quantize(block).isfinite().all() and (scales.abs() < largest).all()):
                return False
        return True

    def choose(self, x: Tensor) -> tuple[Tensor, ...]:
        """(scales, [zeros], [tensor_scale]) from the data x [..., K]."""
        self.check(x.shape)
        return self._choose(self.sparsity.compress(x)[0])

    def _choose(self, kept: Tensor) -> tuple[Tensor, ...]:
        if self.scale is None:
            return ()
        return rules.choose(self.element, self.scale, self._granularity, kept)

    def from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        """The same from observed smallest and largest numbers, in the scales' shape."""
        if self.scale is None:
            return ()
        return rules.from_range(self.element, self.scale, low, high)

    def quantize(self, x: Tensor, params: Sequence[Tensor] | None = None) -> Quantized:
        """Codes of x [..., K]; `params` as `choose` or `from_range` return them, chosen from x if None."""
        self._check_numbers(x)
        kept, indices = self.sparsity.compress(x)
        params = self._params(kept, params)
        if self.layout.across:
            codes = self.pack(by_rows(self._encode, kept, params, self._rows))
        else:
            codes = by_rows(lambda x, p: self.pack(self._encode(x, p)), kept, params, self._rows)
        present = [codes, *params] + ([] if indices is None else [indices])
        return Quantized(self, x.shape[-1], **dict(zip(self.parts, present, strict=True)))

    def dequantize(self, q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [..., K] of q: computed in float32, rounded to `dtype` once."""
        if q.format != self:
            raise FormatError(f"{self} cannot read what is stored as {q.format}; call q.dequantize()")
        if not dtype.is_floating_point:
            raise FormatError(f"values are decoded to a floating dtype such as torch.bfloat16, not {dtype}")
        if self.layout.across:
            codes = self.unpack(q.codes, q.k)
            values = by_rows(lambda c, p: self._decode(c, p, dtype), codes, q.params, self._rows)
        else:
            values = by_rows(
                lambda c, p: self._decode(self.unpack(c, q.k), p, dtype), q.codes, q.params, self._rows
            )
        return self.sparsity.expand(values, q.indices)

    def fake_quantize(self, x: Tensor, params: Sequence[Tensor] | None = None) -> Tensor:
        """dequantize(quantize(x)) in x's dtype, bit for bit, without packing. No gradient: see `ops.py`."""
        self._check_numbers(x)
        kept, indices = self.sparsity.compress(x)
        params = self._params(kept, params)
        values = by_rows(self._rounded, kept, params, self._rows)
        return self.sparsity.expand(values, indices)

    def _params(self, kept: Tensor, params: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if params is None:
            return self._choose(kept)
        wanted = self.params_names
        if len(params) != len(wanted):
            raise FormatError(f"{self} takes the parameters ({', '.join(wanted)}), not {len(params)} tensors")
        return params

    def _encode(self, kept: Tensor, params: Sequence[Tensor]) -> Tensor:
        if self.scale is None:
            return self.element.encode(kept)
        return affine.encode(self.element, self.scale, self._granularity, kept, params)

    def _decode(self, codes: Tensor, params: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        if self.scale is None:
            return self.element.decode(codes).to(dtype)
        return affine.decode(self.element, self.scale, self._granularity, codes, params, dtype)

    def _rounded(self, kept: Tensor, params: Sequence[Tensor]) -> Tensor:
        if self.scale is None:
            return self.element.rounded(kept).to(kept.dtype)
        return affine.rounded(self.element, self.scale, self._granularity, kept, params)

    def pack(self, codes: Tensor) -> Tensor:
        """Unpacked codes, one a byte -> bytes as this format's layout has them."""
        return self.layout.pack(codes, self.element.bits, self.run)

    def unpack(self, packed: Tensor, k: int) -> Tensor:
        """Bytes -> unpacked codes; k is the length of the decoded row (with 2:4, twice the stored codes)."""
        return self.layout.unpack(packed, self.sparsity.kept(k), self.element.bits, self.run)

    def turned(self, name: str, part: Tensor) -> Tensor:
        """A part [.., N, K / group] as the layout stores it, or back: turned if scales lie by group."""
        by_group = self.layout.by_group and self.scale is not None and self.scale.granularity.cols is not None
        return part.mT if by_group and name in ("scales", "zeros") and part.ndim > 1 else part

    def with_layout(self, layout: Layout | str) -> Format:
        """The same numbers, laid out otherwise."""
        if isinstance(layout, str):
            from .text import layout_named

            layout = layout_named(layout)
        return replace(self, layout=layout)

    def relayout(self, q: Quantized, layout: Layout | str) -> Quantized:
        """q with its codes moved to another layout; every value stays."""
        target = self.with_layout(layout)
        codes = target.pack(self.unpack(q.codes, q.k))
        params = {name: getattr(q, name) for name in self.parts if name != "codes"}
        return Quantized(target, q.k, codes, **params)

    def bits_per_element(self, shape: Sequence[int] | None = None) -> float:
        """Bits that a number costs, scales and metadata included: exact for a shape, else for a large one."""
        if shape is not None:
            count = math.prod(shape)
            return self._stored_bits(shape) / count if count else 0.0
        kept = self.sparsity.kept(1 << 20) / (1 << 20)
        bits = self.element.bits if self.layout.name != "bytes" else 8
        total = bits * kept + self.sparsity.index_bits
        if self.scale is not None and self.scale.granularity.cols is not None:
            block = (self.scale.granularity.rows or 1) * self.scale.granularity.cols
            total += (self.scale.bits + self._zero_bits) / block
        return total

    @property
    def _zero_bits(self) -> int:
        assert self.scale is not None
        return {"none": 0, "int": 8}.get(self.scale.zero, self.scale.bits)

    def _stored_bits(self, shape: Sequence[int]) -> int:
        rows, length = math.prod(shape[:-1]), self.sparsity.kept(shape[-1])
        total = 8 * rows * self.layout.row_bytes(self.element.bits, self.run, length)
        if not isinstance(self.sparsity, Dense):
            total += 8 * rows * math.ceil(self.sparsity.index_bits * shape[-1] / 8)
        if self.scale is not None:
            scales = math.prod(self.scale.granularity.scales_shape(shape))
            total += scales * (self.scale.bits + self._zero_bits) + (32 if self.scale.two_level else 0)
        return total


@dataclass(frozen=True)
class Quantized:
    """A tensor in a format: `k` is the length of the decoded last dimension, the rest the stored parts."""

    format: Format
    k: int
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    tensor_scale: Tensor | None = None
    indices: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("codes", "scales", "zeros", "tensor_scale", "indices"):
            if (getattr(self, name) is not None) != (name in self.format.parts):
                raise FormatError(
                    f"{self.format} stores {', '.join(self.format.parts)}; {name} is extra or missing"
                )

    @classmethod
    def from_parts(cls, format: Format, parts: Sequence[Tensor], k: int) -> Quantized:
        """From the stored tensors in the order of `format.parts`."""
        if len(parts) != len(format.parts):
            raise FormatError(f"{format} stores {', '.join(format.parts)}, not {len(parts)} tensors")
        held = dict(zip(format.parts, parts, strict=True))
        found = cls(format, k, **{name: format.turned(name, part) for name, part in held.items()})
        object.__setattr__(found, "parts", list(parts))
        return found

    @cached_property
    def parts(self) -> list[Tensor]:
        """The stored tensors, in the order of `format.parts`: contiguous, scales as the layout has them."""
        return [self.format.turned(name, getattr(self, name)).contiguous() for name in self.format.parts]

    @property
    def params(self) -> list[Tensor]:
        """Scales, zeros, tensor scale: what `Format.quantize` takes as `params`."""
        return [getattr(self, name) for name in self.format.params_names]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(p.nbytes for p in self.parts)

    @property
    def shape(self) -> torch.Size:
        """Shape of the decoded tensor."""
        return torch.Size((*self.codes.shape[:-1], self.k))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [..., K]."""
        return self.format.dequantize(self, dtype)
