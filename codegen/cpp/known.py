"""What torch's operators know: kernels, by the texts of their specs (`headers/known.h`).

In: specs. Out: their kernels, compiled side by side where they are not on disk yet (`library.py`), told to
the operator, so that a call goes from a graph to a kernel without Python.

    Kernels("runtime", Facts, ..).know([spec, ...])

An operator, `headers/<name>.cpp`, is compiled once for a machine. It asks for what it does not know when it
is called.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Generic, TypeVar

import torch

from ..spec import CodegenError
from .library import Library, text_of
from .vectors import Vectors, widest

S = TypeVar("S")
Addresses = Mapping[str, int | None]
_refused = threading.local()  # why, as C reads it, until a thread asks again


def addresses(loaded: ctypes.CDLL, names: Iterable[str]) -> Addresses:
    """Of a library's functions; None where it has not got one."""
    found = {name: getattr(loaded, name, None) for name in names}
    return {name: ctypes.cast(f, ctypes.c_void_p).value if f else None for name, f in found.items()}


class Kernels(Generic[S]):
    """Those of one operator. facts: what it knows of a spec, field by field; parse: a spec from its text;
    library: a spec's, or CodegenError for one that no kernel computes; entries: of a loaded library; told:
    the facts of a spec whose kernel's entries are given."""

    def __init__(
        self,
        operator: str,
        facts: type[ctypes.Structure],
        *,
        parse: Callable[[str], S],
        library: Callable[[S, Vectors], Library],
        entries: Callable[[ctypes.CDLL], Addresses],
        told: Callable[[S, Addresses], ctypes.Structure],
    ) -> None:
        self.operator, self._size = operator, ctypes.sizeof(facts)
        self._parse, self._library, self._entries, self._told = parse, library, entries, told
        # One text has one kernel at a time: another's vectors, in a test, take its place.
        self._known: dict[str, Vectors] = {}
        self._loaded = cache(self._load)
        self._found = lru_cache(maxsize=1024)(self._entries_of)

    def know(self, specs: Iterable[S], vectors: Vectors | None = None) -> None:
        """Makes the operator know these specs, in this processor's vectors or others. CodegenError for one
        that no CPU kernel computes, or that the compiler refuses."""
        vectors = vectors or widest()
        wanted = [spec for spec in dict.fromkeys(specs) if self._known.get(str(spec)) != vectors]
        if not wanted:
            return
        libraries = {spec: self._library(spec, vectors) for spec in wanted}
        apart = list(dict.fromkeys(libraries.values()))
        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
            first = pool.submit(self.loaded)
            entries = dict(zip(apart, pool.map(self._found, apart), strict=True))
            loaded = first.result()
        for spec in wanted:
            facts = self._told(spec, entries[libraries[spec]])
            self._function(loaded, "know")(str(spec).encode(), ctypes.byref(facts))
            self._known[str(spec)] = vectors

    def loaded(self) -> ctypes.CDLL:
        """The operator; torch has it from then on."""
        return self._loaded()

    def _entries_of(self, library: Library) -> Addresses:
        return self._entries(library.loaded(ctypes.CDLL))

    def _load(self) -> ctypes.CDLL:
        """All operators see each other's symbols: their types and C functions have names of their own."""

        def load(path: str) -> ctypes.CDLL:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
            # What Inductor's C++ calls by name is looked for among all libraries that are there for all.
            return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

        loaded = Library(text_of(self.operator), widest(), operator=True).loaded(load)
        size = self._function(loaded, "size_of_facts")()
        if size != self._size:  # one would write past the other's
            raise CodegenError(
                f"{self.operator} reads {size} bytes for each kernel and is told {self._size}: the two do "
                "not list the same fields"
            )
        self._called = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(self._build)  # kept: C calls it
        self._function(loaded, "builder")(self._called)
        return loaded

    def _function(self, loaded: ctypes.CDLL, name: str) -> Callable[..., int]:
        found: Callable[..., int] = getattr(loaded, f"bitfold_{name}_{self.operator}")
        return found

    def _build(self, text: bytes) -> int | None:
        """What the operator calls for a text that it does not know: null, or why there is no kernel."""
        try:
            self.know([self._parse(text.decode())])
        except Exception as error:  # nothing may be raised through C
            why = str(error) or f"{text.decode()}: {type(error).__name__}"
            _refused.why = ctypes.create_string_buffer(why.encode())
            return ctypes.addressof(_refused.why)
        return None
