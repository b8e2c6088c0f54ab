"""A machine that runs the text of a pipelined kernel on a CPU: what it stands in for is Gluon's language.

In: source, tensors, a number of programs. Out: y, written where the kernel would.

    run(source, x, parts of the weight ..., programs=3)

It is unkind in what hardware leaves open. Copies arrive the moment they are sent off, products and stores
are computed when they are waited for and no sooner, and a warp that frees something waits until the fetching
warps have used it: what is freed too early is overwritten before it is read. Whoever read shared memory
otherwise than by a product must have fenced before it frees anything: the copy engine overtakes it. Where
all warps wait, or a barrier counts other bytes than come, it raises. Shared memory starts as NaN. Programs
run last to first, since each waits for its successors only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from gluon_values import Pointer as Pointer
from gluon_values import asm, least, most, pick
from gluon_values import pointer as pointer
from gluon_values import tile as tile
from torch import Tensor

SPINS = 3


class Stuck(Exception):
    """Every warp waits for another."""


@dataclass
class Map:
    """A tensor as the copy engine sees it."""

    held: Tensor
    layout: Any = None
    waits: bool = False  # its numbers come from the kernel before


@dataclass
class Barrier:
    pending: int = 0
    count: int = 0
    coming: int = 0
    completed: int = 0

    def settle(self) -> None:
        if self.pending == 0 and self.coming == 0:
            self.completed += 1
            self.pending = self.count


class Warp(threading.local):
    """unfenced: it read or wrote shared memory otherwise than by the copy engine, and set no fence since;
    late: it waited for the kernel before; stored, met: it stored to memory, and met a barrier after that."""

    unfenced = late = stored = met = False


WARP = Warp()


def fence() -> None:
    WARP.unfenced = False


def wait_for_predecessor() -> None:
    WARP.late = True


def barrier() -> None:
    WARP.met = WARP.stored


@dataclass
class Shared:
    held: Any

    def index(self, i: int) -> Any:
        return self.held[i] if isinstance(self.held, list) else Shared(self.held[i])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.held.permute(*order))

    def load(self, layout: Any) -> Any:
        WARP.unfenced = True
        return tile(self.held.clone())

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.held.dtype and value.shape == self.held.shape
        WARP.unfenced = True
        self.held.copy_(value)


@dataclass
class Sums:
    """An accumulator with products on their way."""

    value: Any
    coming: list[tuple[Any, Shared]] = field(default_factory=list)


class Machine:
    """One run of a kernel."""

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.waiting: dict[int, bool] = {}
        self.fetching: set[int] = set()
        self.stores: dict[int, list[Callable[[], None]]] = {}
        self.program = self.programs = 0
        self.overlaps = False
        self.fault: BaseException | None = None

    # --- barriers and copies ---

    def _changed(self) -> None:
        self.waiting = dict.fromkeys(self.waiting, False)
        self.change.notify_all()

    def _pause(self) -> None:
        """Until something changes; Stuck if nothing can."""
        me = threading.get_ident()
        self.waiting[me] = True
        self.change.notify_all()
        if all(self.waiting.values()):
            self.fault = self.fault or Stuck("every warp waits")
        while self.waiting.get(me) and self.fault is None:
            self.change.wait()
        if self.fault is not None:
            raise Stuck("every warp waits, or one failed")

    def wait(self, bar: Barrier, phase: int) -> None:
        with self.change:
            while bar.completed & 1 == phase:
                self._pause()

    def expect(self, bar: Barrier, size: int) -> None:
        with self.change:
            bar.coming += size
            bar.pending -= 1
            assert bar.pending >= 0, "more arrivals than the barrier counts"

    def arrive(self, bar: Barrier, pred: bool = True) -> None:
        if not pred:
            return
        assert not WARP.unfenced, "what is freed may still be read: no fence"
        with self.change:
            bar.pending -= 1
            assert bar.pending >= 0, "more arrivals than the barrier counts"
            bar.settle()
            self._changed()
            if threading.get_ident() not in self.fetching:
                self.change.wait_for(lambda: self._fetched() or self.fault is not None)

    def _fetched(self) -> bool:
        """Whether the fetching warps have done all they can."""
        return all(self.waiting.get(busy, True) for busy in self.fetching)

    def fetch(self, source: Map, at: Sequence[int], bar: Barrier, to: Shared) -> None:
        rows, cols = to.held.shape
        assert not (self.overlaps and source.waits and not WARP.late), "x is read ahead of the kernel before"
        with self.change:
            to.held.zero_()
            found = source.held[at[0] : at[0] + rows, at[1] : at[1] + cols]
            to.held[: found.shape[0], : found.shape[1]] = found
            bar.coming -= to.held.numel() * to.held.element_size()
            assert bar.coming >= 0, "more bytes than the barrier expects"
            bar.settle()
            self._changed()

    def put(self, to: Map, at: Sequence[int], source: Shared) -> None:
        assert not WARP.unfenced, "what is copied may not be there yet: no fence"

        def copy() -> None:
            place = to.held[at[0] : at[0] + source.held.shape[0], at[1] : at[1] + source.held.shape[1]]
            place.copy_(source.held[: place.shape[0], : place.shape[1]])

        self.stores.setdefault(threading.get_ident(), []).append(copy)

    def store_wait(self, pending: int) -> None:
        mine = self.stores.setdefault(threading.get_ident(), [])
        while len(mine) > pending:
            mine.pop(0)()

    # --- warps ---

    def warp_specialize(
        self, parts: Sequence[tuple[Any, Any]], warps: list[int], registers: list[int]
    ) -> None:
        """The last two parts fetch."""
        assert len(warps) == len(registers) == len(parts) - 1
        assert not WARP.unfenced, "barriers are used before they are there: no fence"
        threads = [threading.Thread(target=self._work, args=part) for part in parts]
        with self.change:
            for thread in threads:
                thread.start()
                assert thread.ident is not None
                self.waiting[thread.ident] = False
            self.fetching = {thread.ident for thread in threads[-2:] if thread.ident is not None}
        for thread in threads:
            thread.join()
        if self.fault is not None:
            raise self.fault

    def _work(self, function: Callable[..., None], given: Sequence[Any]) -> None:
        with self.change:
            me = threading.get_ident()
        try:
            function(*given)
        except BaseException as fault:
            self.fault = self.fault or fault
        with self.change:
            del self.waiting[me]
            self.fetching.discard(me)
            if self.waiting and all(self.waiting.values()):
                self.fault = self.fault or Stuck("every warp waits")
            self.change.notify_all()


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
    if layout == "barrier":
        return Shared([Barrier() for _ in range(shape[0])])
    held = torch.empty(tuple(shape), dtype=dtype)
    return Shared(
        held.fill_(float("nan") if dtype.is_floating_point else 0x7ABC if dtype.itemsize > 1 else 0x55)
    )


def _init(bar: Barrier, count: int) -> None:
    bar.count = bar.pending = count
    WARP.unfenced = True


def _mma(a: Any, b: Shared, sums: Any, is_async: bool, use_acc: bool = True) -> Sums:
    held = sums if isinstance(sums, Sums) else Sums(sums)
    assert use_acc or not held.coming, "sums begin anew while products are on their way"
    return Sums(held.value if use_acc else torch.zeros_like(held.value), [*held.coming, (a, b)])


def _mma_wait(left: int, deps: Sequence[Any]) -> Any:
    sums, *rest = deps
    value, coming = sums.value, list(sums.coming)
    while len(coming) > left:
        a, b = coming.pop(0)
        left_side = a.held if isinstance(a, Shared) else a
        # Products of 8-bit integers, up to 2**24 of them, are exact in float64.
        found = left_side.to(torch.float32).to(torch.float64) @ b.held.to(torch.float32).to(torch.float64)
        value = value + tile(found.to(value.dtype))
    made = Sums(value, coming) if left else value
    return (made, *rest) if rest else made


def _load(place: Pointer, cache_modifier: str = "", mask: Any = None, other: Any = 0) -> Any:
    if mask is not None:
        inside = place.memory[torch.where(mask, place.at, 0)]
        return tile(torch.where(mask, inside, torch.full_like(inside, other)))
    found = place.memory[place.at]
    return tile(found.clone()) if isinstance(found, Tensor) else found


def _store(place: Pointer, value: Tensor, mask: Any = True) -> None:
    at = torch.as_tensor(place.at)
    here = torch.as_tensor(mask).expand(at.shape)
    WARP.stored, WARP.met = True, False
    place.memory[at[here]] = value.expand(at.shape)[here].as_subclass(torch.Tensor)


def _exchange(place: Pointer, value: int, sem: str) -> int:
    if value == 1:  # tells another program that a part is there
        assert sem == "release" and WARP.met, "a part is announced that may not be there yet"
        WARP.stored = WARP.met = False
    before = int(place.memory[place.at])
    place.memory[place.at] = value
    return before


def language(machine: Machine) -> SimpleNamespace:
    """What a module imports as `tl`."""
    return SimpleNamespace(
        constexpr=lambda value: value,
        static_range=range,
        bfloat16=torch.bfloat16,
        float16=torch.float16,
        float32=torch.float32,
        float8e4nv=torch.float8_e4m3fn,
        int8=torch.int8,
        int16=torch.int16,
        int32=torch.int32,
        int64=torch.int64,
        minimum=least,
        maximum=most,
        where=pick,
        arange=lambda start, end, layout=None: tile(torch.arange(start, end)),
        broadcast_to=lambda held, shape: held.expand(shape),
        uint16=torch.uint16,
        zeros=lambda shape, dtype, layout: tile(torch.zeros(shape, dtype=dtype)),
        load=_load,
        store=_store,
        atomic_add=_Spun(),
        atomic_xchg=_exchange,
        barrier=barrier,
        inline_asm_elementwise=asm,
        allocate_shared_memory=_allocate,
        NVMMADistributedLayout=lambda *of: None,
        DotOperandLayout=lambda *of: None,
        SliceLayout=lambda *of: None,
        program_id=lambda axis: machine.program,
        num_programs=lambda axis: machine.programs,
        warp_specialize=machine.warp_specialize,
    )


class _Spun:
    """An atomic addition that may not find 0 for ever."""

    def __init__(self) -> None:
        self.zeros = 0

    def __call__(self, place: Pointer, value: int, sem: str) -> int:
        found = int(place.memory[place.at])
        self.zeros = 0 if found else self.zeros + 1
        if self.zeros > SPINS:
            raise Stuck("a program waits for a part that none of its successors wrote")
        place.memory[place.at] += value
        return found


def jit_namespace() -> SimpleNamespace:
    return SimpleNamespace(jit=_jit)


def _jit(function: Any = None, **_: Any) -> Any:
    return function if function is not None else lambda inner: inner


def run(source: str, *, maps: Sequence[Tensor], rest: Sequence[Any], programs: int) -> None:
    """Runs `kernel` of this module: maps are x, codes and y; rest what follows, tensors as pointers."""
    machine = Machine()
    text = "\n".join(line for line in source.split("\n") if not line.startswith("from triton"))
    held: dict[str, Any] = {
        "gluon": jit_namespace(),
        "tl": language(machine),
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: "barrier",
            init=_init,
            wait=machine.wait,
            expect=machine.expect,
            arrive=machine.arrive,
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=machine.fetch,
            async_copy_shared_to_global=machine.put,
            store_wait=machine.store_wait,
        ),
        "warpgroup_mma": _mma,
        "warpgroup_mma_wait": _mma_wait,
        "fence_async_shared": fence,
        "gdc_wait": wait_for_predecessor,
        "gdc_launch_dependents": lambda: None,
    }
    exec(compile(text, "kernel", "exec"), held)
    arguments = [pointer(value) if isinstance(value, Tensor) else value for value in rest]
    machine.programs, machine.overlaps = programs, "gdc_launch_dependents()" in source
    for program in reversed(range(programs)):
        machine.program = program
        held["kernel"](*(Map(value, waits=i == 0) for i, value in enumerate(maps)), *arguments)
        assert not any(machine.stores.values()), "a store nobody waited for"
