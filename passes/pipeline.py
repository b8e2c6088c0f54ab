"""A pipeline: passes in order, as a value that prints and parses, and leaves a trace of what it did.

Comes in: a graph, or a text such as `annotate{recipe=int4},observe,fold`. Goes out: the graph rewritten in
place, verified after every pass, and a `Trace`.

    Pipeline.parse("annotate{recipe=int4},fold")  ->  Pipeline((Annotate(recipe='int4'), Fold()))
    str(...)                                      ->  annotate{recipe=int4},fold

A pass's options are its dataclass fields; those at their default are not printed. A value that holds a comma
or a brace outside brackets, a quote or a blank at its ends is written in double quotes, as in JSON.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from ..formats.errors import BitfoldError
from .core import MissRecord, Pass, Progress, State, state
from .graph_snapshot import GraphSnapshot, Recorder
from .options import parse_passes, print_pass, split_options
from .registry import find_pass
from .stages import Stage, VerificationError
from .trace import Change, Step, Trace, compare
from .verify import verify


@dataclass(frozen=True)
class Pipeline:
    """Passes that run one after the other."""

    passes: tuple[Pass, ...]

    def __init__(self, passes: Iterable[Pass]) -> None:
        object.__setattr__(self, "passes", tuple(passes))
        for given in self.passes:
            if not isinstance(given, Pass):
                raise TypeError(
                    f"a pipeline holds passes, not {given!r}; write it as text for Pipeline.parse"
                )

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """The pipeline that `text` spells. BitfoldError, with near names, for an unknown pass or option."""
        return cls(parse_passes(text, find_pass))

    def __str__(self) -> str:
        return ",".join(map(print_pass, self.passes))

    def run(
        self, gm: GraphModule, *, verify: bool = True, record: bool = True, progress: Progress | None = None
    ) -> Trace:
        """Rewrite `gm` in place. Raises BitfoldError when a pass cannot start from the graph's stage (before
        anything is changed by it), VerificationError when a pass leaves a graph that breaks its stage.

        record: whether the trace holds the graph as plain data at every step, for the page. Without, its
        steps say what was rewritten, missed and how long it took, and nothing of the graph is copied;
        progress: called before each pass, with its text."""
        if not isinstance(gm, GraphModule):
            raise BitfoldError(
                f"a pipeline runs on a graph, not on a {type(gm).__name__}; capture(model, inputs) makes one"
            )
        self._check_order(state(gm).stage)
        recorder, trace = Recorder() if record else _NoRecorder(), Trace()
        trace.follow(gm)
        with _collector_paused():
            if verify:
                _verify(gm, "capture")
            # What capture could not bring into normal form was found before the first pass.
            now, stage = recorder.snapshot(gm), state(gm).stage.name
            trace.steps.append(Step("captured", "", stage, now, 0, 0.0, _untold(gm), Change()))
            for done, step in enumerate(self.passes):
                if progress is not None:
                    progress(print_pass(step), done, len(self.passes))
                self._run_one(step, gm, trace, recorder, verify)
            gm.recompile()
        return trace

    def _run_one(
        self, step: Pass, gm: GraphModule, trace: Trace, recorder: Recorder | _NoRecorder, check: bool
    ) -> None:
        here = state(gm)
        refuse(step, here)
        started = time.perf_counter()
        rewrites = step.apply(gm)
        seconds = time.perf_counter() - started
        if step.produces is not None and step.produces > here.stage:
            here.stage = step.produces
        if check:
            _verify(gm, print_pass(step))
        name, options = split_options(print_pass(step))
        now = recorder.snapshot(gm)
        change = compare(trace.steps[-1].snapshot, now)
        trace.steps.append(Step(name, options, here.stage.name, now, rewrites, seconds, _untold(gm), change))

    def _check_order(self, stage: Stage) -> None:
        """Refuse an order that cannot work before the first pass has run."""
        here = State(stage=stage)
        for step in self.passes:
            refuse(step, here)
            if step.produces is not None and step.produces > here.stage:
                here.stage = step.produces


class _NoRecorder:
    """In the place of a recorder: an empty graph at every step."""

    def snapshot(self, gm: GraphModule) -> GraphSnapshot:
        return _NOTHING


_NOTHING = GraphSnapshot(())


def _untold(gm: GraphModule) -> tuple[MissRecord, ...]:
    """The misses that no step of any run has shown yet."""
    here = state(gm)
    fresh, here.told = tuple(here.misses[here.told :]), len(here.misses)
    return fresh


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No search for cyclic garbage meanwhile: passes make many small objects that stay, and walking all of
    them again and again took a quarter of the time at 16,000 nodes. Tensors go by reference count as ever."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _verify(gm: GraphModule, after: str) -> None:
    verify(gm, state(gm).stage, after=after)


def refuse(step: Pass, here: State) -> None:
    """BitfoldError if the pass does not take a graph at this stage."""
    needs = step.requires
    if needs is None:
        return
    if isinstance(needs, Stage):
        if here.stage >= needs:
            return
        wanted = f"a graph that is {needs.name} or later"
    else:
        if here.stage in needs:
            return
        wanted = "a graph that is " + " or ".join(stage.name for stage in needs)
    early = all(here.stage < stage for stage in ([needs] if isinstance(needs, Stage) else needs))
    hint = "; put the missing pass before it" if early else " already"
    raise BitfoldError(f"the pass '{step.name}' takes {wanted}, and this one is {here.stage.name}{hint}")


__all__ = ["Pipeline", "Progress", "VerificationError", "refuse"]
