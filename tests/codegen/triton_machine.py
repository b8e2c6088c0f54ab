"""A machine that runs the text of a Triton kernel as a GPU gets it, with its assembly, on a CPU.

In: a spec, a schedule, a call's tensors. Out: y, and the locks.

    run(spec, Schedule.parse("m8 n16 w4 s3 k2 lane"), [x, codes, scales])   ->   y [M, n], locks

Triton's interpreter has no inline assembly and runs the plain twin of each kernel; what only the other text
has (which decoder goes with which scale) is seen here. Every address is checked, y and what parts of sums
lie in are NaN before, and programs run in an order of their own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import gluon_machine
import torch
from gluon_machine import tile
from torch import Tensor

from bitfold.codegen import GemmSpec, Schedule
from bitfold.codegen.triton.arguments import sums_are_integers, values
from bitfold.codegen.triton.build import grid, workspace_size
from bitfold.codegen.triton.source import source


class Pointer(gluon_machine.Pointer):
    """One whose addresses are checked."""

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.memory, self.at + by)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """(addresses, which of them are meant)."""
        at, here = torch.broadcast_tensors(torch.as_tensor(self.at), torch.as_tensor(mask))
        at, here = at.as_subclass(torch.Tensor), here.as_subclass(torch.Tensor)
        assert ((at >= 0) & (at < len(self.memory)) | ~here).all(), "an address outside of the tensor"
        return at, here


def _load(
    place: Pointer, mask: Any = True, other: float = 0, eviction_policy: str = "", cache_modifier: str = ""
) -> Any:
    at, here = place.places(mask)
    # Torch has no indexing of float8.
    memory = place.memory.view(torch.uint8) if place.memory.itemsize == 1 else place.memory
    assert other == 0
    found = torch.where(here, memory[torch.where(here, at, 0)], 0)
    return tile(found.view(place.memory.dtype))


def _store(place: Pointer, value: Any, mask: Any = True) -> None:
    at, here = place.places(mask)
    given = torch.as_tensor(value).as_subclass(torch.Tensor).expand(at.shape)
    place.memory[at[here]] = given[here].to(place.memory.dtype)


def _dot(a: Tensor, b: Tensor, sums: Any = None, out_dtype: torch.dtype = torch.float32) -> Any:
    exact = [side.as_subclass(torch.Tensor).to(torch.float32).double() for side in (a, b)]
    found = tile((exact[0] @ exact[1]).to(out_dtype))
    return found if sums is None else found + sums


def _count(place: Pointer, value: int, sem: str) -> int:
    before = int(place.memory[place.at])
    place.memory[place.at] += value
    return before


def _full(shape: Sequence[int], value: float, dtype: torch.dtype) -> Any:
    return tile(torch.full(tuple(shape), float(value)).to(dtype))


def run(spec: GemmSpec, schedule: Schedule, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """y [M, n] and the locks, which are zero again."""
    m = inputs[0].shape[0]
    programs = grid(spec, schedule, m)
    locks = torch.zeros(max(programs[0] * programs[2], 1), dtype=torch.int32)
    partial = torch.full((max(workspace_size(spec, schedule, m), 1),), float("nan"))
    if sums_are_integers(spec, schedule):
        partial = torch.full_like(partial, 77777, dtype=torch.int32)
    y = torch.full((m, spec.n), float("nan"), dtype=spec.out)
    given = values(spec, schedule, spec.inputs(inputs), y, (partial, locks), plain=False)
    language = gluon_machine.language(gluon_machine.Machine())
    at = [0, 0, 0]
    more = {
        "range": lambda start, end, num_stages: range(start, end),
        "program_id": lambda axis: at[axis],
        "zeros": lambda shape, dtype: tile(torch.zeros(shape, dtype=dtype)),
        "debug_barrier": lambda: None,
        "uint8": torch.uint8,
        "full": _full,
        "load": _load,
        "store": _store,
        "dot": _dot,
        "atomic_add": _count,
    }
    held: dict[str, Any] = {
        "triton": gluon_machine.jit_namespace(),
        "tl": SimpleNamespace(**(vars(language) | more)),
        "gdc_wait": lambda: None,
        "gdc_launch_dependents": lambda: None,
    }
    lines = source(spec, schedule, plain=False).split("\n")
    text = "\n".join(line for line in lines if not line.startswith(("import triton", "from triton")))
    exec(compile(text, "kernel", "exec"), held)
    named = {
        name: Pointer(value.as_strided((value.numel(),), (1,))) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    order = [(i, j, k) for i in range(programs[0]) for j in range(programs[1]) for k in range(programs[2])]
    random.Random(0).shuffle(order)
    for one in order:
        at[:] = one
        held["kernel"](**named)
    return y, locks
