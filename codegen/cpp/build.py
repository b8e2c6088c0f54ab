"""Kernels of products for this processor: `bitfold::fused` knows them.

In: specs. Out: a call goes from the graph to the kernel without Python.

    know([spec, ...])            compiled side by side, those that are not on disk yet (`library.py`)
    torch.ops.bitfold.fused([x, codes, scales], str(spec))

Operators themselves (`headers/runtime.cpp`, `conv_runtime.cpp`, `attention.cpp`) are compiled once for a
machine.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache

import torch

from ...formats.granularity import Granularity
from ..spec import CodegenError, GemmSpec
from .body import Body
from .library import Library, text_of
from .source import source
from .support import obstacle
from .vectors import FLAGS, vectors

OUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BYTE = -1  # beside these: whatever has one byte


class Facts(ctypes.Structure):
    """What `runtime.cpp` knows of a spec, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("run", "many", "wants")),
        *((name, ctypes.c_int64) for name in ("n", "k", "padded", "stride")),
        *((name, ctypes.c_int64) for name in ("scale_row", "scale_group", "groups", "sum_cols")),
        *((name, ctypes.c_int32) for name in ("weights", "parts", "scales", "zeros", "level")),
        *(
            (name, ctypes.c_int32)
            for name in ("bias", "matrices", "vectors", "codes", "out", "token_scales", "x")
        ),
        *((name, ctypes.c_int64) for name in ("scale_count", "scale_type", "zero_type")),
    ]


def library_of(spec: GemmSpec, words: str | None = None) -> Library:
    """The kernel's, in this processor's vectors or others."""
    return Library(source(spec), words or vectors())


@lru_cache(maxsize=1024)
def _entries(library: Library) -> dict[str, int | None]:
    """The addresses of the kernel's functions; None where it has not got one."""
    loaded = library.loaded(ctypes.CDLL)
    found = {name: getattr(loaded, name, None) for name in ("run", "many", "wants")}
    return {name: ctypes.cast(f, ctypes.c_void_p).value if f else None for name, f in found.items()}


@cache
def operator(name: str, told: str, build: Callable[[str], None]) -> ctypes.CDLL:
    """One of torch's operators, `headers/<name>.cpp`, loaded. `told`: its function that takes `build`, which
    makes a kernel that the operator does not know yet when it is called.

    All operators see each other's symbols: their types and C functions have names of their own."""
    text = text_of(name)

    def load(path: str) -> ctypes.CDLL:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        # What Inductor's C++ calls by name is looked for among all libraries that are there for all.
        return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

    loaded = Library(text, vectors(), operator=True).loaded(load)
    getattr(loaded, told)(_called_from_c(build))
    return loaded


_refused = threading.local()  # why, as C reads it, until a thread asks again


@cache
def _called_from_c(build: Callable[[str], None]) -> Callable[[bytes], int | None]:
    """Kept alive: the operator calls it."""

    def call(text: bytes) -> int | None:
        try:
            build(text.decode())
        except Exception as error:  # nothing may be raised through C
            why = str(error) or f"{text.decode()}: {type(error).__name__}"
            _refused.why = ctypes.create_string_buffer(why.encode())
            return ctypes.addressof(_refused.why)
        return None

    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(call)


def _build(text: str) -> None:
    know([GemmSpec.parse(text)])


_known: set[tuple[str, str]] = set()


def know(specs: Iterable[GemmSpec], words: str | None = None) -> None:
    """Makes the operator know these specs; their kernels are compiled side by side. CodegenError for one that
    no CPU kernel computes, or that the compiler refuses."""
    words = words or vectors()
    wanted = [spec for spec in dict.fromkeys(specs) if (str(spec), words) not in _known]
    if not wanted:
        return
    for spec in wanted:
        if (why := obstacle(spec, words)) is not None:
            raise CodegenError(
                f"no CPU kernel computes {spec}: {why}; graphs lowered with target cpu ask for none such"
            )
    libraries = {spec: library_of(spec, words) for spec in wanted}
    apart = list(dict.fromkeys(libraries.values()))
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        first = pool.submit(operator, "runtime", "bitfold_builder", _build)
        entries = dict(zip(apart, pool.map(_entries, apart), strict=True))
        loaded = first.result()
    assert loaded.bitfold_size_of_facts() == ctypes.sizeof(Facts), "the two do not list the same fields"
    for spec in wanted:
        facts = facts_of(spec, entries[libraries[spec]])
        loaded.bitfold_know(str(spec).encode(), ctypes.byref(facts))
        # One text has one kernel at a time: another's vectors, in a test, take its place.
        _known.difference_update({(str(spec), other) for other in FLAGS})
        _known.add((str(spec), words))


def facts_of(spec: GemmSpec, entries: Mapping[str, int | None]) -> Facts:
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


def call(spec: GemmSpec, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """y of one call, for tests and benchmarks."""
    know([spec])
    found: list[torch.Tensor] = torch.ops.bitfold.fused(list(inputs), str(spec))
    return found[0]
