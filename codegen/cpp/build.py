"""Kernels of products for this processor: `bitfold::fused` knows them (`known.py`).

In: specs. Out: a call goes from the graph to the kernel without Python.

    know([spec, ...])            compiled side by side, those that are not on disk yet
    torch.ops.bitfold.fused([x, codes, scales], str(spec))
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch

from ...formats.granularity import Granularity
from ..spec import CodegenError, GemmSpec
from .body import Body
from .known import Addresses, Kernels, addresses
from .library import Library
from .source import source
from .support import obstacle, of_another
from .vectors import Vectors

OUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BYTE = -1  # beside these: whatever has one byte
ENTRIES = ("run", "many", "wants")  # functions of a kernel


class Facts(ctypes.Structure):
    """What `runtime.cpp` knows of a spec, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ENTRIES),
        *((name, ctypes.c_int64) for name in ("n", "k", "padded", "stride")),
        *((name, ctypes.c_int64) for name in ("scale_row", "scale_group", "groups", "sum_cols")),
        *((name, ctypes.c_int32) for name in ("weights", "parts", "scales", "zeros", "level")),
        *(
            (name, ctypes.c_int32)
            for name in ("bias", "matrices", "vectors", "codes", "out", "token_scales", "x")
        ),
        *((name, ctypes.c_int64) for name in ("scale_count", "scale_type", "zero_type")),
    ]


def facts_of(spec: GemmSpec, entries: Addresses) -> Facts:
    """The numbers that `runtime.cpp` needs."""
    body, parts = Body(spec), spec.weight.parts
    walk, scale = body.walk, spec.weight.scale
    place = {name: parts.index(name) if name in parts else -1 for name in ("scales", "zeros", "tensor_scale")}
    grain = scale.granularity if scale is not None else Granularity(None, None)
    groups = 1 if grain.cols is None else -(-spec.k // grain.cols)
    rows = 1 if grain.rows is None else spec.n // grain.rows
    by_group = spec.weight.layout.by_group and grain.cols is not None
    tokens = 0
    if spec.activation is not None and spec.activation.scale is not None:
        of_x = spec.activation.scale.granularity
        tokens = 1 if of_x.rows is None else 1 + (1 if of_x.cols is None else spec.k // of_x.cols)
    return Facts(
        **entries,
        n=spec.n,
        k=spec.k,
        padded=walk.runs * walk.codes,
        stride=walk.stride,
        scale_row=1 if by_group else groups,
        scale_group=rows if by_group else 1,
        groups=groups,
        sum_cols=body.sum_cols,
        weights=spec.weights,
        parts=len(parts),
        scales=place["scales"],
        zeros=place["zeros"],
        level=place["tensor_scale"],
        bias=int(spec.bias),
        matrices=spec.epilogue.count("e"),
        vectors=spec.epilogue.count("v"),
        codes=int(spec.activation is not None),
        out=OUTS[spec.out],
        token_scales=tokens,
        x=OUTS[spec.dtype],
        scale_count=rows * groups,
        scale_type=OUTS.get(scale.stored, BYTE) if scale is not None else BYTE,
        zero_type=OUTS.get(scale.stored, BYTE) if scale is not None and scale.zero != "int" else BYTE,
    )


def library_of(spec: GemmSpec, vectors: Vectors) -> Library:
    """Of the kernel. CodegenError for a spec that no CPU kernel computes."""
    if (why := obstacle(spec, vectors)) is not None:
        ours = "" if of_another(spec, vectors) else "; graphs lowered with target cpu ask for none such"
        raise CodegenError(f"no CPU kernel computes {spec}: {why}{ours}")
    return Library(source(spec), vectors)


_PRODUCTS = Kernels(
    "runtime",
    Facts,
    parse=GemmSpec.parse,
    library=library_of,
    entries=lambda loaded: addresses(loaded, ENTRIES),
    told=facts_of,
)


def know(specs: Iterable[GemmSpec], vectors: Vectors | None = None) -> None:
    """Makes the operator know these specs. CodegenError for one that no CPU kernel computes, or that the
    compiler refuses."""
    _PRODUCTS.know(specs, vectors)


def call(spec: GemmSpec, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """y of one call, for tests and benchmarks."""
    know([spec])
    found: list[torch.Tensor] = torch.ops.bitfold.fused(list(inputs), str(spec))
    return found[0]
