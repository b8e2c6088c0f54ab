"""What a function that torch compiled is inside: Inductor's C function, where nothing else is done.

In: a compiled function, arguments. Out: its results, and the C function's address, or why there is none.

    entry(layer, (x, w))   ->   ((y,), Entry(0x7f..)); that takes handles of x and w and gives one of y

Around Inductor's function torch puts Python that restores views, counts versions and more, where a graph
needs it. Whether this one does is seen in a call: if Inductor's function gets the very tensors that were
given, and its results are what is returned, then its address may be called with the next ones.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor

from ...passes import Miss

# As compilers write `inductor_entry_impl(AtenTensorHandle*, AtenTensorHandle*)`.
ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"

_patching = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """library: keeps the function's code loaded."""

    address: int
    library: Any


def entry(run: Callable[..., Any], args: Sequence[Any]) -> tuple[tuple[Any, ...], Entry | Miss]:
    """What `run(*args)` returns, and what it is."""
    from torch._inductor.output_code import CompiledFxGraph

    seen: list[tuple[Any, list[Any], list[Any]]] = []
    thread, plain = threading.get_ident(), CompiledFxGraph.__call__

    def call(graph: Any, inputs: Sequence[Any]) -> Any:
        given = list(inputs)  # who is called clears it
        made = plain(graph, inputs)
        if threading.get_ident() == thread:
            seen.append((graph, given, list(made)))
        return made

    with _patching, mock.patch.object(CompiledFxGraph, "__call__", call):
        results = tuple(run(*args))
    if len(seen) != 1:
        return results, Miss(f"{len(seen)} of Inductor's functions were called")
    graph, given, made = seen[0]
    if not _same(given, args) or not _same(made, results):
        return results, Miss("torch changes what Inductor's function takes or gives")
    return results, _address(graph)


def _same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(a is b and isinstance(a, Tensor) for a, b in pairs)


def _address(graph: Any) -> Entry | Miss:
    """Of the C function that Inductor's Python module calls (torch 2.10 to 2.14 write it alike)."""
    if graph.constants:
        return Miss("constants are among its inputs")
    cells = getattr(graph.current_callable, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells]
    found = [one for one in held if getattr(one, "__name__", "") == "inductor_entry_cpp"]
    file = (
        getattr(getattr(found[0], "__self__", None), "__file__", None)
        if len(held) == len(found) == 1
        else None
    )
    if file is None:
        return Miss("Inductor's function is not C++ alone")
    library = ctypes.CDLL(file)
    function = getattr(library, ENTRY, None)
    address = ctypes.cast(function, ctypes.c_void_p).value if function is not None else None
    return Miss("Inductor's library has another entry") if address is None else Entry(address, library)
