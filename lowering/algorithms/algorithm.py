"""An algorithm as a user writes it: passes that rotate, balance channels, decide codes, and learn, in order.

In: text such as "awq,clip,gptq{actorder=true}", or a pipeline of such passes. Out: an `Algorithm`, checked.

    algorithm_of("awq,clip,gptq,learn")   ->   block before: awq;  solve: clip, gptq;  block after: learn

Solvers decide about one weight at a time (`passes/algorithms/solve.py`); the others have a place before or
after them (`passes/algorithms/on_model.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...formats import BitfoldError
from ...passes import Pass, Pipeline, find_pass
from ...passes.algorithms.on_model import OnModel, Place
from ...passes.algorithms.solve import Solver
from ...passes.registry import pass_names


@dataclass(frozen=True)
class Algorithm:
    """Passes in order: on the whole model, on a block, on each weight, on the block again, on the model
    again."""

    steps: tuple[Solver | OnModel, ...]

    def at(self, place: Place) -> tuple[OnModel, ...]:
        """The passes that have this place."""
        return tuple(step for step in self.steps if isinstance(step, OnModel) and step.place == place)

    @property
    def solvers(self) -> tuple[Solver, ...]:
        return tuple(step for step in self.steps if isinstance(step, Solver))

    @property
    def solve(self) -> Pipeline:
        return Pipeline(self.solvers)

    @property
    def needs_data(self) -> bool:
        """Whether it measures what goes into layers (or, to balance, what blocks are called with)."""
        return self.measures or len(self.solvers) < len(self.steps)

    @property
    def measures(self) -> bool:
        """Whether a solver looks at second moments of what goes into each layer."""
        return any(step.needs_inputs or step.wants_inputs for step in self.solvers)

    @property
    def wants_exact(self) -> bool:
        """Whether it compares what goes into layers with what goes into them in the float model."""
        return any(step.wants_exact for step in self.solvers)

    @property
    def together(self) -> bool:
        """Whether codes of a block are decided together, when its last weight is solved."""
        return bool(self.at("block after"))

    @property
    def wants_floats(self) -> bool:
        """Whether it looks at float weights again when all codes are decided."""
        return bool(self.at("model after"))

    @property
    def changes_weights(self) -> bool:
        """Whether what is rounded is another float weight than the model's."""
        return bool(self.at("model before") or self.at("block before") or self.wants_exact)

    def on_whole(self) -> str:
        """The name of the first pass that wants the whole model, or ""."""
        return next((step.name for step in (*self.at("model before"), *self.at("model after"))), "")

    def on_blocks(self) -> str:
        """The name of the first pass that wants a model of blocks, or ""."""
        blocks = (*self.at("block before"), *self.at("block after"))
        exact = [step for step in self.solvers if step.wants_exact]
        return next((step.name for step in self.steps if step in blocks or step in exact), "")

    def __str__(self) -> str:
        return str(Pipeline(self.steps))


def algorithm_of(given: str | Pipeline) -> Algorithm:
    """The passes. Raises BitfoldError for one that decides no codes, naming those that do, and for an order
    in which one would throw away what another has decided."""
    steps = Pipeline.parse(given) if isinstance(given, str) else given
    if not isinstance(steps, Pipeline) or not steps.passes:
        raise BitfoldError(f"an algorithm is text such as 'clip,gptq', not {given!r}; there are {_known()}")
    found: list[Solver | OnModel] = []
    for step in steps.passes:
        if not isinstance(step, Solver | OnModel):
            raise BitfoldError(f"the pass {step.name!r} decides no codes; an algorithm is made of {_known()}")
        _check_said(step)
        found.append(step)
    for first, second in pairwise(found):
        if first.name == second.name and _place(first) != "model after":
            raise BitfoldError(f"{first.name} is there twice, one after the other; leave one out")
        _check_places(first, second, found)
    algorithm = Algorithm(tuple(found))
    _check_order(algorithm.solvers)
    return algorithm


_PLACES = ("model before", "block before", "solve", "block after", "model after")
_RANKS = ("weights", "scales", "codes")


def _check_said(step: Solver | OnModel) -> None:
    """Raises BitfoldError for a pass that says no known place, or decides what is not known."""
    if isinstance(step, OnModel):
        place = getattr(step, "place", None)
        known = [one for one in _PLACES if one != "solve"]
        if place not in known:
            raise BitfoldError(f"{step.name} has the place {place!r}; places are {', '.join(known)}")
    elif step.decides not in ("", *_RANKS):
        raise BitfoldError(f"{step.name} decides {step.decides!r}; it may be {', '.join(_RANKS)} or ''")


def _place(step: Solver | OnModel) -> str:
    return step.place if isinstance(step, OnModel) else "solve"


def _check_places(first: Solver | OnModel, second: Solver | OnModel, steps: Sequence[Pass]) -> None:
    """BitfoldError if the turn of `second` is before that of `first`, or both are for the whole model."""
    here, there = _place(first), _place(second)
    if here == there == "model after":
        raise BitfoldError(
            f"{first.name} and {second.name} both have the last word, on each layer and on the whole model; "
            "leave one out"
        )
    if _PLACES.index(here) <= _PLACES.index(there) and not here == there == "model before":
        return
    if here in ("block after", "model after"):
        what = "goes on from" if here == "block after" else "looks at"
        raise BitfoldError(f"{first.name} {what} what the others have decided; put it after {second.name}")
    if there == "model before":
        raise BitfoldError(f"{second.name} changes what all others look at; put it first, once")
    solver = next(step for step in steps if isinstance(step, Solver))
    raise BitfoldError(f"{second.name} changes what is rounded; put it before {solver.name}")


def _check_order(steps: Sequence[Solver]) -> None:
    """Weights first, then scales, then codes: each would throw away what is decided later."""
    last: Solver | None = None
    for step in steps:
        if step.wants_codes and (last is None or last.decides != "codes"):
            raise BitfoldError(f"{step.name} wants codes that are decided; put gptq before it")
        if not step.keeps_codes and last is not None and last.decides == "codes":
            raise BitfoldError(
                f"{step.name} starts from scales and would throw away the codes of {last.name}; "
                f"put it before {last.name}"
            )
        if not step.decides:
            continue
        if last is not None and _RANKS.index(step.decides) < _RANKS.index(last.decides):
            raise BitfoldError(
                f"{step.name} decides {step.decides} and would throw away the {last.decides} of {last.name}; "
                f"put it before {last.name}"
            )
        last = step


def _known() -> str:
    return ", ".join(name for name in pass_names() if issubclass(find_pass(name), Solver | OnModel))
