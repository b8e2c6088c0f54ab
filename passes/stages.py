"""The stages of a graph: their order, and what a graph at each may hold.

Comes in: nothing. Goes out: `Stage`, and for each the `Spec` that `verify` holds a graph to.

    SPECS[Stage.folded].gone  ->  {'bitfold::fake_quantize': 'a fake-quantize node is left in a folded graph'}
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule


class Stage(Enum):
    """How far a graph has come; ordered."""

    captured = 0
    annotated = 1
    observed = 2
    fake_quantized = 3
    folded = 4
    fused = 5
    lowered = 6

    def __lt__(self, other: Stage) -> bool:
        return self.value < other.value

    def __le__(self, other: Stage) -> bool:
        return self.value <= other.value

    def __gt__(self, other: Stage) -> bool:
        return self.value > other.value

    def __ge__(self, other: Stage) -> bool:
        return self.value >= other.value


class VerificationError(RuntimeError):
    """A pass left a graph that breaks its stage's specification: the pass's bug, not the user's mistake."""


@dataclass(frozen=True)
class Spec:
    """What a graph at one stage may hold. `modules`: what a called module may be; `gone`: operators that may
    not be left, with the reason."""

    modules: Callable[[nn.Module], bool]
    modules_say: str
    gone: dict[str, str]


def is_observer(module: nn.Module) -> bool:
    """Observers carry `is_observer = True`, so that one written elsewhere is known too."""
    return bool(getattr(module, "is_observer", False))


def _no_module(module: nn.Module) -> bool:
    return False


def _region(module: nn.Module) -> bool:
    return isinstance(module, GraphModule)


def _lowered_module(module: nn.Module) -> bool:
    return not is_observer(module)


_NO_MODULES = "a called module is left, capture flattens modules into operators"
_FLOAT_FORM = {
    "bitfold::quantize": "a folded operator stands in a graph that is not folded yet",
    "bitfold::dequantize": "a folded operator stands in a graph that is not folded yet",
}
_FOLDED_FORM = {"bitfold::fake_quantize": "a fake-quantize node is left in a folded graph"}

SPECS: dict[Stage, Spec] = {
    Stage.captured: Spec(_no_module, _NO_MODULES, {}),
    Stage.annotated: Spec(_no_module, _NO_MODULES, {}),
    Stage.observed: Spec(is_observer, "a called module is neither an observer nor flattened", _FLOAT_FORM),
    Stage.fake_quantized: Spec(_no_module, "an observer or another called module is left", _FLOAT_FORM),
    Stage.folded: Spec(_no_module, "an observer or another called module is left", _FOLDED_FORM),
    Stage.fused: Spec(_region, "a called module is not an outlined region (a GraphModule)", _FOLDED_FORM),
    Stage.lowered: Spec(_lowered_module, "an observer is left in a lowered graph", _FOLDED_FORM),
}


@lru_cache(maxsize=4096)
def operator_name(target: Any) -> str:
    """`namespace::name` of an operator ('' for a Python function), without its overload."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{target._name}"
    return ""


_SYMBOLIC = {"torch", "math", "_operator", "torch.fx.experimental.symbolic_shapes", "builtins"}


@lru_cache(maxsize=4096)
def is_legal_function(target: Any) -> bool:
    """ATen and custom operators, higher-order ones, `getitem`, and arithmetic on symbolic sizes."""
    if operator_name(target) or target is operator.getitem:
        return True
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__name__", "")
    if module == "torch" or module.startswith(("torch.amp", "torch._C", "torch.utils._sympy")):
        # torch.sym_max and friends, and the grad-mode and autocast switches that a capture keeps
        return name.startswith(("sym_", "_sym_", "_set_grad", "_enter", "_exit"))
    return module in _SYMBOLIC


def find_attribute(gm: nn.Module, path: str) -> Any:
    """What the dotted `path` names in `gm`, or None."""
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found
