"""Solvers: passes that decide scales and codes of weights by more than rounding each number to the nearest.

In: an annotated graph; on its anchors the statistics of their inputs (`inputs.py`), for solvers that want
them. Out: the same graph with a `Draft` on each anchor whose weight takes a format; `fold` makes codes of it.

    anchor.meta[INPUTS] = seen                                         an `Inputs`: gptq wants it
    Pipeline.parse("annotate{recipe=int4[g64]},clip,gptq").run(gm)     clip chooses scales, gptq rounds

A solver sees one weight at a time, as float32 rows [N, K], and its format as nothing but a format: whatever
element, scale and granularity it is made of.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.fx import GraphModule, Node

from ...formats import BitfoldError, Format, format
from ...formats.sparsity import Dense
from ..core import Miss, Pass, report
from ..note import Note, annotated
from ..stages import Stage
from .draft import DRAFT, Draft, draft_of
from .inputs import INPUTS, Inputs


@dataclass(frozen=True)
class Task:
    """One weight to decide about. `inputs` is there if the solver said that it needs them."""

    layer: str
    format: Format
    draft: Draft
    inputs: Inputs | None

    @property
    def weight(self) -> Tensor:
        """float32 [..., K]."""
        return self.draft.weight

    @property
    def moment(self) -> Tensor:
        """Second moment of the inputs, [K, K]."""
        assert self.inputs is not None
        return self.inputs.moment


@dataclass(frozen=True)
class Solver(Pass):
    """needs_inputs: the solver cannot do without statistics; wants_inputs: it is better with them;
    wants_exact: with the float model's activations beside those behind rounded weights; decides: what it
    chooses, which one that comes later must not throw away; wants_codes: they are decided before it;
    keeps_codes: what it starts from may be codes (else it would throw them away)."""

    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.annotated, Stage.observed)
    needs_inputs: ClassVar[bool] = False
    wants_inputs: ClassVar[bool] = False
    wants_exact: ClassVar[bool] = False
    decides: ClassVar[Literal["weights", "scales", "codes", ""]] = ""
    wants_codes: ClassVar[bool] = False
    keeps_codes: ClassVar[bool] = True

    def apply(self, gm: GraphModule) -> int:
        """Number of weights decided about; of the others, and of what one does not get, a miss says why."""
        made = 0
        for node, note in annotated(gm):
            if not note.weight or note.stored:
                continue
            task = self._task(gm, node, note)
            if isinstance(task, Miss):
                report(gm, node, task, asked=self.name)
                continue
            short = self.falls_short(task)
            if short is not None:
                report(gm, node, short, asked=self.name)
            try:
                node.meta[DRAFT] = self.solve(task)
            except BitfoldError as error:
                raise BitfoldError(f"layer {task.layer}: {error}") from error
            made += node.meta[DRAFT] is not task.draft
        return made

    def falls_short(self, task: Task) -> Miss | None:
        """What this weight does not get of what the options ask for, and why: some formats have no place for
        it."""
        return None

    def _task(self, gm: GraphModule, node: Node, note: Note) -> Task | Miss:
        assert note.weight is not None
        fmt, draft = format(note.weight), draft_of(gm, node, note)
        if draft is None:
            return Miss("its weight is computed, or is codes already")
        if fmt.scale is None:
            return Miss(f"{fmt} has no scales: each number is cast by itself")
        if not isinstance(fmt.sparsity, Dense):
            return Miss(f"{fmt} stores some of the columns only, and {self.name} is for dense formats")
        inputs = node.meta.get(INPUTS) if self.needs_inputs or self.wants_inputs else None
        if self.needs_inputs and inputs is None:
            return Miss(
                f"{self.name} wants what goes into a linear; no such statistics are there for this "
                f"{note.anchor}"
            )
        return Task(note.layer, fmt, draft, inputs)

    @abstractmethod
    def solve(self, task: Task) -> Draft:
        """The draft, made more definite; the task's own, if nothing is decided. What it raises is said of the
        layer."""
