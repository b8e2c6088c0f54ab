"""An algorithm as a user writes it: passes that rotate, balance channels, decide codes, and learn, in order.

In: text such as "awq,clip,gptq{actorder=true}", or a pipeline of such passes. Out: an `Algorithm`, checked.

    algorithm_of("awq,clip,gptq")  ->  Algorithm((AWQ(),), Pipeline((Clip(), GPTQ())), None)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...formats import BitfoldError
from ...passes import Pass, Pipeline, find_pass
from ...passes.algorithms.balance import Balancer
from ...passes.algorithms.correct_bias import CorrectBias
from ...passes.algorithms.learn import Learn
from ...passes.algorithms.rotate import Rotate
from ...passes.algorithms.solve import Solver
from ...passes.algorithms.tune import Tune
from ...passes.registry import pass_names


@dataclass(frozen=True)
class Algorithm:
    """What is done to the whole model (`rotate`), to the channels of a block, then to each weight, and then
    to the weights of the block together."""

    balance: tuple[Balancer, ...]
    solve: Pipeline
    learn: Learn | None = None
    rotate: Rotate | None = None
    correct: CorrectBias | None = None
    tune: Tune | None = None

    @property
    def needs_data(self) -> bool:
        """Whether it measures what goes into layers (or, to balance, what blocks are called with)."""
        others = self.balance or self.learn or self.rotate or self.correct or self.tune
        return bool(others) or self.measures

    @property
    def measures(self) -> bool:
        """Whether a solver looks at second moments of what goes into each layer."""
        return any(
            isinstance(step, Solver) and (step.needs_inputs or step.wants_inputs)
            for step in self.solve.passes
        )

    @property
    def wants_exact(self) -> bool:
        """Whether it compares what goes into layers with what goes into them in the float model."""
        return any(isinstance(step, Solver) and step.wants_exact for step in self.solve.passes)

    @property
    def wants_floats(self) -> bool:
        """Whether it looks at float weights again when all codes are decided."""
        return self.correct is not None or self.tune is not None

    @property
    def changes_weights(self) -> bool:
        """Whether what is rounded is another float weight than the model's."""
        return bool(self.rotate or self.balance or self.wants_exact)

    def on_blocks(self) -> str:
        """The name of the first pass that wants a model of blocks, or ""."""
        wanting = (
            step.name
            for step in self._steps()
            if isinstance(step, Balancer | Learn) or (isinstance(step, Solver) and step.wants_exact)
        )
        return next(wanting, "")

    def __str__(self) -> str:
        return str(Pipeline(self._steps()))

    def _steps(self) -> tuple[Pass, ...]:
        first = (self.rotate,) if self.rotate else ()
        last = tuple(step for step in (self.learn, self.tune, self.correct) if step is not None)
        return (*first, *self.balance, *self.solve.passes, *last)


def algorithm_of(given: str | Pipeline) -> Algorithm:
    """The passes. Raises BitfoldError for one that decides no codes, naming those that do, and for channels
    that
    are to be balanced after codes are decided."""
    steps = Pipeline.parse(given) if isinstance(given, str) else given
    if not isinstance(steps, Pipeline) or not steps.passes:
        raise BitfoldError(f"an algorithm is text such as 'clip,gptq', not {given!r}; there are {_known()}")
    balance: list[Balancer] = []
    solve: list[Pass] = []
    learn: Learn | None = None
    rotate: Rotate | None = None
    correct: CorrectBias | None = None
    tune: Tune | None = None
    for step in steps.passes:
        last = correct or tune
        if last is not None and isinstance(step, Tune | CorrectBias):
            raise BitfoldError(
                f"{last.name} and {step.name} both have the last word, on each layer and on the whole model; "
                "leave one out"
            )
        if last is not None:
            raise BitfoldError(f"{last.name} looks at what all others have decided; put it after {step.name}")
        if isinstance(step, Tune):
            tune = step
        elif isinstance(step, CorrectBias):
            correct = step
        elif learn is not None:
            raise BitfoldError(f"learn goes on from what the others have decided; put it after {step.name}")
        elif isinstance(step, Rotate):
            if balance or solve or rotate:
                raise BitfoldError("rotate turns what all others look at; put it first, once")
            rotate = step
        elif isinstance(step, Learn):
            learn = step
        elif isinstance(step, Solver):
            solve.append(step)
        elif not isinstance(step, Balancer):
            raise BitfoldError(f"the pass {step.name!r} decides no codes; an algorithm is made of {_known()}")
        elif solve:
            raise BitfoldError(f"{step.name} changes what is rounded; put it before {solve[0].name}")
        else:
            balance.append(step)
    _check_order([step for step in solve if isinstance(step, Solver)])
    return Algorithm(tuple(balance), Pipeline(solve), learn, rotate, correct, tune)


def _check_order(steps: Sequence[Solver]) -> None:
    """Weights first, then scales, then codes: each would throw away what is decided later."""
    ranks = ("weights", "scales", "codes")
    last: Solver | None = None
    for step in steps:
        if step.wants_codes and (last is None or last.decides != "codes"):
            raise BitfoldError(f"{step.name} wants codes that are decided; put gptq before it")
        if not step.decides:
            continue
        if last is not None and ranks.index(step.decides) < ranks.index(last.decides):
            raise BitfoldError(
                f"{step.name} decides {step.decides} and would throw away the {last.decides} of {last.name}; "
                f"put it before {last.name}"
            )
        last = step


_KINDS = (Solver, Balancer, Learn, Rotate, CorrectBias, Tune)


def _known() -> str:
    return ", ".join(name for name in pass_names() if issubclass(find_pass(name), _KINDS))
