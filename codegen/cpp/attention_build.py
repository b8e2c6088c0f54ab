"""Attention's kernels for this processor: `bitfold::attend_few` knows them, so that no Python runs between a
graph and its cache.

In: specs. Out: compiled side by side, kept on disk as products are (`known.py`).

    know_attention([spec]);  torch.ops.bitfold.attend_few(q, cache, limits, mask, pages, str(spec))
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

from ..attention import AttentionSpec, cache_shapes
from .attention import source
from .build import BYTE, OUTS
from .known import Addresses, Kernels, addresses
from .library import Library
from .vectors import Vectors

_MASKS = {"none": 0, "bool": 1, "float": 2}
_PARTS = 6  # kCacheParts
_ENTRIES, _LENGTH = -1, -2  # kEntries, kLength


class AttentionFacts(ctypes.Structure):
    """What `attention.cpp` knows of a spec, field by field."""

    _fields_ = [
        ("run", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "page")),
        *((name, ctypes.c_int32) for name in ("parts", "x", "mask")),
        ("scale", ctypes.c_float),
        ("sizes", ctypes.c_int64 * 4 * _PARTS),
        ("types", ctypes.c_int64 * _PARTS),
    ]


def facts_of(spec: AttentionSpec, entries: Addresses) -> AttentionFacts:
    """The numbers that `attention.cpp` needs."""
    return AttentionFacts(
        run=entries["attend"],
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        dim=spec.dim,
        page=spec.page,
        parts=len(spec.parts),
        x=OUTS[spec.dtype],
        mask=_MASKS[spec.mask],
        scale=spec.softmax_scale,
        **_parts(spec),
    )


def _parts(spec: AttentionSpec) -> dict[str, Any]:
    """Sizes and types of a cache's parts; what a call decides has a number below 0."""
    sizes, types = (ctypes.c_int64 * 4 * _PARTS)(), (ctypes.c_int64 * _PARTS)()
    for i, (shape, dtype) in enumerate(cache_shapes(spec, _ENTRIES, _LENGTH).values()):
        sizes[i][:], types[i] = list(shape), OUTS.get(dtype, BYTE)
    return {"sizes": sizes, "types": types}


_ATTENTION = Kernels(
    "attention",
    AttentionFacts,
    parse=AttentionSpec.parse,
    library=lambda spec, vectors: Library(source(spec), vectors),
    entries=lambda loaded: addresses(loaded, ("attend",)),
    told=facts_of,
)


def know_attention(specs: Iterable[AttentionSpec], vectors: Vectors | None = None) -> None:
    """Makes the operator know these specs. CodegenError if the compiler refuses one."""
    _ATTENTION.know(specs, vectors)


def attention_operator() -> ctypes.CDLL:
    """Torch's operators of attention, loaded; a text that they do not know is built when one is called."""
    return _ATTENTION.loaded()
