"""An algorithm as a user writes it: the passes that decide codes, in order.

In: text such as "clip,gptq{actorder=true}", or a pipeline of such passes. Out: a `Pipeline` of solvers,
checked.

    algorithm_of("clip,gptq")  ->  Pipeline((Clip(), GPTQ()))
"""

from __future__ import annotations

from ..formats import BitfoldError
from ..passes import Pipeline, find_pass
from ..passes.registry import pass_names
from ..passes.solve import Solver


def algorithm_of(given: str | Pipeline) -> Pipeline:
    """The passes. Raises BitfoldError for one that decides no codes, naming those that do."""
    steps = Pipeline.parse(given) if isinstance(given, str) else given
    if not isinstance(steps, Pipeline) or not steps.passes:
        raise BitfoldError(f"an algorithm is text such as 'clip,gptq', not {given!r}; there are {_known()}")
    for step in steps.passes:
        if not isinstance(step, Solver):
            raise BitfoldError(f"the pass {step.name!r} decides no codes; an algorithm is made of {_known()}")
    return steps


def _known() -> str:
    return ", ".join(name for name in pass_names() if issubclass(find_pass(name), Solver))
