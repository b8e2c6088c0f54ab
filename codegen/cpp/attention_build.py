"""Attention's kernels for this processor: `bitfold::attend_few` knows them, so that no Python runs between a
graph and its cache.

In: specs. Out: compiled side by side, kept on disk as products are (`library.py`).

    know_attention([spec]);  torch.ops.bitfold.attend_few(q, cache, limits, mask, pages, str(spec))
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from ..attention import AttentionSpec, cache_shapes
from .attention import source
from .build import BYTE, OUTS, operator
from .library import Library
from .vectors import vectors

_MASKS = {"none": 0, "bool": 1, "float": 2}
_PARTS = 6  # kParts
_ENTRIES, _LENGTH = -1, -2  # kEntries, kLength
_known: set[tuple[str, str]] = set()


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


def know_attention(specs: Iterable[AttentionSpec], words: str | None = None) -> None:
    """Makes the operator know these specs. CodegenError if the compiler refuses one."""
    words = words or vectors()
    wanted = [spec for spec in dict.fromkeys(specs) if (str(spec), words) not in _known]
    if not wanted:
        return
    libraries = [Library(source(spec), words) for spec in wanted]
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        first = pool.submit(attention_operator)
        addresses = list(pool.map(_entry, libraries))
        loaded = first.result()
    size = loaded.bitfold_size_of_attention_facts()
    assert size == ctypes.sizeof(AttentionFacts), "the two do not list the same fields"
    for spec, run in zip(wanted, addresses, strict=True):
        facts = AttentionFacts(
            run=run,
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
        loaded.bitfold_know_attention(str(spec).encode(), ctypes.byref(facts))
        # One text has one kernel at a time: another's vectors, in a test, take its place.
        _known.difference_update({known for known in _known if known[0] == str(spec)})
        _known.add((str(spec), words))


def _parts(spec: AttentionSpec) -> dict[str, Any]:
    """Sizes and types of a cache's parts; what a call decides has a number below 0."""
    sizes, types = (ctypes.c_int64 * 4 * _PARTS)(), (ctypes.c_int64 * _PARTS)()
    for i, (shape, dtype) in enumerate(cache_shapes(spec, _ENTRIES, _LENGTH).values()):
        sizes[i][:], types[i] = list(shape), OUTS.get(dtype, BYTE)
    return {"sizes": sizes, "types": types}


@cache
def _entry(library: Library) -> int | None:
    loaded = library.loaded(ctypes.CDLL)
    return ctypes.cast(loaded.attend, ctypes.c_void_p).value


def attention_operator() -> ctypes.CDLL:
    """Torch's operators of attention, loaded; a text that they do not know is built when one is called."""
    return operator("attention", "bitfold_attention_builder", _build)


def _build(text: str) -> None:
    know_attention([AttentionSpec.parse(text)])
