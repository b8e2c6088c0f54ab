"""Kernels of convolutions compiled and made known to torch's operator `bitfold::conv`; see `build.py`.

In: `ConvSpec`s. Out: nothing; a call of the operator then goes to the kernel without Python.

    know([ConvSpec.parse("conv 64x32x3x3 p1x1 int8[panels16x4t9] x:int8[tensor]")])
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from ..conv import ConvSpec, has_zero
from .build import operator
from .conv_end import normed
from .conv_source import source
from .library import Library
from .vectors import FLAGS, vectors

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


class Facts(ctypes.Structure):
    """What `conv_runtime.cpp` knows of a spec, field by field."""

    _fields_ = [
        ("run", ctypes.c_void_p),
        ("widen", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _PLACES),
        *((name, ctypes.c_int32) for name in _COUNTS),
    ]


def facts_of(spec: ConvSpec, run: int, widen: int | None) -> Facts:
    """The numbers that `conv_runtime.cpp` needs."""
    scale = spec.weight.scale
    assert scale is not None
    top, left, bottom, right = spec.padding
    height, width = spec.kernel or (1, 1)
    return Facts(
        run=run,
        widen=widen,
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


@lru_cache(maxsize=1024)
def _entries(library: Library) -> tuple[int, int | None]:
    """The addresses of the kernel, and of what makes x ready for it, if it does not take x as it is."""
    loaded = library.loaded(ctypes.CDLL)
    run = ctypes.cast(loaded.run, ctypes.c_void_p).value
    assert run is not None
    return run, ctypes.cast(loaded.widen, ctypes.c_void_p).value if loaded.bytes() == 2 else None


def _build(text: str) -> None:
    know([ConvSpec.parse(text)])


_known: set[tuple[str, str]] = set()


def know(specs: Iterable[ConvSpec], words: str | None = None) -> None:
    """Makes the operator know these specs; kernels are compiled side by side, `words` being their vectors."""
    words = words or vectors()
    wanted = [spec for spec in dict.fromkeys(specs) if (str(spec), words) not in _known]
    if not wanted:
        return
    libraries = [Library(source(spec), words, loops=True) for spec in wanted]
    apart = list(dict.fromkeys(libraries))
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        first: Any = pool.submit(operator, "conv_runtime", "bitfold_conv_builder", _build)
        entries = dict(zip(apart, pool.map(_entries, apart), strict=True))
        loaded = first.result()
    assert loaded.bitfold_size_of_conv_facts() == ctypes.sizeof(Facts), "the two do not list the same fields"
    for spec, library in zip(wanted, libraries, strict=True):
        loaded.bitfold_know_conv(str(spec).encode(), ctypes.byref(facts_of(spec, *entries[library])))
        # One text has one kernel at a time: another's vectors, in a test, take its place.
        _known.difference_update({(str(spec), other) for other in FLAGS})
        _known.add((str(spec), words))
