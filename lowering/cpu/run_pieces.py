"""Runs the pieces of a graph one after the other; those that are C++ inside, without Python in between.

In: compiled pieces, which values each takes and makes, what the whole returns. Out: a function.

    Run([Step(before, (0,), (2,)), Step(layer, (2, 1), (3,)), Step(layer, (3, 1), (4,))], result)
    first call:   before, layer, layer;  looks at what each of them is (`entries.py`)
    from then on: before, [layer, layer] as one call (`codegen/cpp/sequence_build.py`)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.fx import Node

from ...codegen import CodegenError
from ...codegen.cpp.sequence_build import Native, sequence
from ...passes import Miss
from ..target import Compiled
from .entries import Entry, entry


@dataclass(frozen=True)
class Step:
    """given, made: numbers of values, of which the first are the arguments of all; gone: of those that nobody
    reads any more."""

    run: Compiled
    given: tuple[int, ...]
    made: tuple[int, ...]
    gone: tuple[int, ...] = ()


class Run:
    """Calls pieces one after the other; a value is let go after the last piece that reads it. written:
    numbers of the arguments that pieces write to. told: gets the steps and what they are, after the first
    call."""

    def __init__(self, steps: Sequence[Step], result: Any, written: Sequence[int] = ()) -> None:
        self.result, self.written, self.first = result, tuple(written), True
        self.told: Callable[[Run, Sequence[Step], Mapping[int, Entry | Miss]], None] | None = None
        self.kept = {place.index for place in _places(result)}
        self.steps = _let_go(steps, self.kept)
        self.size = 1 + max(i for step in steps for i in (*step.given, *step.made))

    def __call__(self, *args: Any) -> Any:
        first, steps = self.first, self.steps  # another thread may be in its first call, and change both
        if len(steps) == 1 and not first:
            return self._alone(steps[0], args)
        values = [*args, *[None] * (self.size - len(args))]
        entries: dict[int, Entry | Miss] = {}
        for step in steps:
            arguments = [values[i] for i in step.given]
            if first and id(step.run) not in entries:
                found, entries[id(step.run)] = entry(step.run, arguments)
            else:
                found = step.run(*arguments)
            for i, value in zip(step.made, found, strict=True):
                values[i] = value
            for i in step.gone:
                values[i] = None
        if first:
            if self.told is not None:
                self.told(self, steps, entries)
            self.steps, self.first = _let_go(joined(steps, entries, self.kept), self.kept), False
        elif self.written:  # else torch does so for each piece
            increment_version([args[i] for i in self.written])
        return _filled(self.result, values)

    def _alone(self, step: Step, args: tuple[Any, ...]) -> Any:
        """The same with one step: a small model's call takes no longer than this."""
        found = step.run(*[args[i] for i in step.given])
        if self.written:
            increment_version([args[i] for i in self.written])
        return _filled(self.result, {**dict(enumerate(args)), **dict(zip(step.made, found, strict=True))})


def joined(steps: Sequence[Step], entries: Mapping[int, Entry | Miss], kept: set[int]) -> list[Step]:
    """The steps, neighbours that are C functions as one. kept: values that are returned."""
    found: list[Step] = []
    at = 0
    for native, group in groupby(steps, lambda step: bool(entries.get(id(step.run)))):
        members = list(group)
        at += len(members)
        if native and len(members) > 1:
            behind = {i for step in steps[at:] for i in step.given} | kept
            members = _as_one(members, entries, behind)
        found += members
    return found


def _as_one(steps: list[Step], entries: Mapping[int, Entry | Miss], behind: set[int]) -> list[Step]:
    made = list(dict.fromkeys(i for step in steps for i in step.made))
    given = list(dict.fromkeys(i for step in steps for i in step.given if i not in set(made)))
    results = [i for i in made if i in behind]
    number = {value: i for i, value in enumerate([*given, *made])}
    told, held = [], []
    for step in steps:
        of = entries[id(step.run)]
        assert isinstance(of, Entry)
        told.append(
            Native(of.address, tuple(number[i] for i in step.given), tuple(number[i] for i in step.made))
        )
        held.append((step.run, of))  # as long as it may be called
    try:
        run = sequence(told, len(given), [number[i] for i in results])
    except CodegenError as error:
        _say_once(str(error))
        return steps  # as they were

    def call(*args: Tensor, held: object = held) -> list[Tensor]:
        return run(list(args))

    return [Step(call, tuple(given), tuple(results))]


@cache
def _say_once(why: str) -> None:
    if "Python.h" in why:
        why = "there is no Python.h; install Python's headers, python3-dev"
    warnings.warn(
        f"layers are called from Python one by one, which takes longer than calling them from C++ ({why})",
        stacklevel=2,
    )


def _let_go(steps: Sequence[Step], kept: set[int]) -> list[Step]:
    """The same, each with the values that nobody reads after it."""
    needed, found = set(kept), []
    for step in reversed(steps):
        gone = tuple(i for i in {*step.given, *step.made} if i not in needed)
        found.append(Step(step.run, step.given, step.made, gone))
        needed.update(step.given)
    return found[::-1]


class Place:
    """Where a result lies among the values of a run."""

    def __init__(self, index: int) -> None:
        self.index = index


def placed(result: Any, places: dict[Node, int]) -> Any:
    """What a graph returns, with places for nodes."""
    if isinstance(result, Node):
        return Place(places[result])
    return tuple(placed(item, places) for item in result) if isinstance(result, list | tuple) else result


def _places(result: Any) -> list[Place]:
    if isinstance(result, Place):
        return [result]
    return [place for item in result for place in _places(item)] if isinstance(result, list | tuple) else []


def _filled(result: Any, values: Sequence[Any] | Mapping[int, Any]) -> Any:
    if isinstance(result, Place):
        return values[result.index]
    return tuple(_filled(item, values) for item in result) if isinstance(result, list | tuple) else result
