"""Functions that Inductor wrote, called one after the other from C++.

In: their addresses, and which values each takes and makes. Out: a function of tensors.

    sequence([Native(layer, (0, 1), (3,)), Native(layer, (3, 2), (4,))], inputs=3, results=(4,))
    ->  run([x, w0, w1])  =  [layer(layer(x, w0), w1)]

From Python, a call of a compiled layer takes as long as its smaller kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..spec import CodegenError
from .library import Library, text_of
from .vectors import widest


@dataclass(frozen=True)
class Native:
    """entry: the address of a function; given, made: numbers of values."""

    entry: int
    given: tuple[int, ...]
    made: tuple[int, ...]


def sequence(
    steps: Sequence[Native], inputs: int, results: Sequence[int]
) -> Callable[[list[Tensor]], list[Tensor]]:
    """What runs the steps. Values are numbered: the inputs, then what the steps make. CodegenError if the
    compiler refuses what calls them."""
    last = {i: at for at, step in enumerate(steps) for i in step.given}
    count = 1 + max([inputs - 1, *(i for step in steps for i in step.made)])
    plan = [count, len(steps), len(results)]
    for at, step in enumerate(steps):
        plan += [step.entry, len(step.given), len(step.made)]
        for place, i in enumerate(step.given):
            gone = last[i] == at and i not in results and i not in step.given[place + 1 :]
            plan.append(-1 - i if gone else i)
        plan += step.made
    told = (ctypes.c_int64 * (len(plan) + len(results)))(*plan, *results)
    call, handles = _caller(), torch._C._aoti
    if isinstance(call, CodegenError):
        raise CodegenError(str(call))

    def run(values: list[Tensor]) -> list[Tensor]:
        given = handles.unsafe_alloc_void_ptrs_from_tensors(values)
        found: list[Tensor] = handles.alloc_tensors_by_stealing_from_void_ptrs(call(told, given))
        return found

    return run


@cache
def _caller() -> Any:
    """The function of headers/sequence.cpp, called with the interpreter's lock; or why there is none, so
    that the compiler is asked once."""
    try:
        call = Library(text_of("sequence"), widest(), operator=True).loaded(ctypes.PyDLL).bitfold_sequence
    except CodegenError as error:
        return error
    call.argtypes, call.restype = [ctypes.c_void_p, ctypes.py_object], ctypes.py_object
    return call
