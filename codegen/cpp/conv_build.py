"""Kernels of convolutions compiled and made known to torch's operator `bitfold::conv`; see `known.py`.

In: `ConvSpec`s. Out: nothing; a call of the operator then goes to the kernel without Python.

    know([ConvSpec.parse("conv 64x32x3x3 p1x1 int8[panels16x4t9] x:int8[tensor]")])
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from ..conv import ConvSpec, has_zero
from .conv_end import normed
from .conv_source import source
from .known import Addresses, Kernels, addresses
from .library import Library
from .vectors import Vectors

_PLACES = (
    *("n", "k", "kernel_height", "kernel_width", "stride_y", "stride_x", "top", "left", "bottom", "right"),
    *("dilation_y", "dilation_x", "groups", "row_bytes", "scales"),
)
_COUNTS = (
    "product",
    "depthwise",
    "bias",
    "positive",
    "reads",
    "vectors",
    "writes",
    "norm",
    "read_codes",
    "write_codes",
    "zero",
    "read_zeros",
    "write_zeros",
)


class ConvFacts(ctypes.Structure):
    """What `conv_runtime.cpp` knows of a spec, field by field."""

    _fields_ = [
        ("run", ctypes.c_void_p),
        ("widen", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _PLACES),
        *((name, ctypes.c_int32) for name in _COUNTS),
    ]


def facts_of(spec: ConvSpec, entries: Addresses) -> ConvFacts:
    """The numbers that `conv_runtime.cpp` needs."""
    scale = spec.weight.scale
    assert scale is not None
    top, left, bottom, right = spec.padding
    height, width = spec.kernel or (1, 1)
    return ConvFacts(
        **entries,
        n=spec.n,
        k=spec.k,
        kernel_height=height,
        kernel_width=width,
        stride_y=spec.stride[0],
        stride_x=spec.stride[1],
        top=top,
        left=left,
        bottom=bottom,
        right=right,
        dilation_y=spec.dilation[0],
        dilation_x=spec.dilation[1],
        groups=spec.groups,
        row_bytes=spec.layout.row_bytes(8, None, spec.products),
        scales=1 if scale.granularity.rows is None else spec.n,
        product=int(not spec.kernel),
        depthwise=int(spec.depthwise),
        bias=int(spec.bias),
        positive=int(spec.positive),
        reads=len(spec.reads),
        vectors=spec.epilogue.count("v"),
        writes=len(spec.writes),
        norm=int(normed(spec.epilogue)),
        read_codes=sum(1 << i for i, f in enumerate(spec.reads) if f is not None),
        write_codes=sum(1 << i for i, f in enumerate(spec.writes) if f is not None),
        zero=int(has_zero(spec.activation)),
        read_zeros=sum(1 << i for i, f in enumerate(spec.reads) if has_zero(f)),
        write_zeros=sum(1 << i for i, f in enumerate(spec.writes) if has_zero(f)),
    )


def _entries(loaded: ctypes.CDLL) -> Addresses:
    """Of the kernel, and of what makes x ready for it, if it does not take x as it is."""
    return addresses(loaded, ("run", "widen") if loaded.bytes() == 2 else ("run",))


_CONVOLUTIONS = Kernels(
    "conv_runtime",
    ConvFacts,
    parse=ConvSpec.parse,
    library=lambda spec, vectors: Library(source(spec), vectors, loops=True),
    entries=_entries,
    told=facts_of,
)


def know(specs: Iterable[ConvSpec], vectors: Vectors | None = None) -> None:
    """Makes the operator know these specs. CodegenError if the compiler refuses one."""
    _CONVOLUTIONS.know(specs, vectors)
