"""The stages of a graph, what each promises, and `verify`, which holds a graph to it.

Comes in: a graph and the stage it claims. Goes out: nothing, or a `VerificationError` that names the node,
the line of the user's model, and the pass that was running.

    verify(gm, Stage.folded, after="fold")
    -> VerificationError: after fold: node 'quant_3' (block.2.fc at model.py:41): an observer is left in a
    folded graph

One walk over the nodes: the cost is linear, also for a constant with thousands of users.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from .provenance import has_provenance, origin


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
    """A pass left a graph that breaks its stage's specification: a bug in the pass, never the user's
    mistake."""


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
def _is_legal_function(target: Any) -> bool:
    """ATen and custom operators, higher-order ones, `getitem`, and arithmetic on symbolic sizes."""
    if operator_name(target) or target is operator.getitem:
        return True
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__name__", "")
    if module == "torch" or module.startswith(("torch.amp", "torch._C", "torch.utils._sympy")):
        # torch.sym_max and friends, and the grad-mode and autocast switches that a capture keeps
        return name.startswith(("sym_", "_sym_", "_set_grad", "_enter", "_exit"))
    return module in _SYMBOLIC


def verify(gm: GraphModule, stage: Stage, *, after: str = "") -> None:
    """Hold `gm` to its stage's specification. Raises VerificationError for the first node that breaks it."""
    spec = SPECS[stage]
    seen: set[Node] = set()
    names: set[str] = set()
    attributes: set[str] = set()
    ended = False
    for node in gm.graph.nodes:
        fault = _fault(gm, node, spec, seen, names, attributes)
        if fault is None and ended:
            fault = "a node follows the output"
        if fault is not None:
            raise VerificationError(_sentence(node, fault, after or f"stage {stage.name}"))
        ended = node.op == "output"
        seen.add(node)
        names.add(node.name)
    if not ended:
        raise VerificationError(f"after {after or stage.name}: the graph has no output")


def _fault(
    gm: GraphModule,
    node: Node,
    spec: Spec,
    seen: set[Node],
    names: set[str],
    attributes: set[str],
) -> str | None:
    if node.graph is not gm.graph:
        return "it belongs to another graph"
    if node.name in names:
        return "its name is taken by an earlier node"
    for source in node.all_input_nodes:
        if source not in seen:
            return f"it uses '{source.name}', which comes later or was erased"
    match node.op:
        case "placeholder" | "output":
            return None if node.op == "output" else _value_fault(node)
        case "get_attr":
            return _attribute_fault(gm, node, attributes)
        case "call_function":
            return _function_fault(node, spec)
        case "call_module":
            return _module_fault(gm, node, spec)
    return f"a {node.op} is not legal in a captured graph"


def _function_fault(node: Node, spec: Spec) -> str | None:
    if not _is_legal_function(node.target):
        return f"the Python function {node.target!r} is not an operator"
    gone = spec.gone.get(operator_name(node.target))
    if gone is not None:
        return gone
    return _value_fault(node)


def _module_fault(gm: GraphModule, node: Node, spec: Spec) -> str | None:
    module = find_attribute(gm, str(node.target))
    if not isinstance(module, nn.Module):
        return f"the graph has no module {node.target!r}"
    if not spec.modules(module):
        return f"{spec.modules_say}: {type(module).__name__} {node.target!r}"
    return _value_fault(node)


def _attribute_fault(gm: GraphModule, node: Node, attributes: set[str]) -> str | None:
    target = str(node.target)
    if target not in attributes:
        value = find_attribute(gm, target)
        if value is None:
            return f"the graph has no attribute {target!r}"
        attributes.add(target)
        if not isinstance(value, Tensor):
            return None
        fake = node.meta.get("val")
        if isinstance(fake, Tensor) and (
            fake.dtype != value.dtype or tuple(fake.shape) != tuple(value.shape)
        ):
            return f"its meta['val'] says {_kind(fake)} but the constant {target!r} is {_kind(value)}"
        if fake is None:
            return "it has no meta['val']"
    return None


def _value_fault(node: Node) -> str | None:
    if "val" not in node.meta:
        # What returns nothing (an assertion, a switch of grad mode) has no value and no users.
        if node.op == "call_function" and not node.users:
            return None
        return "it has no meta['val']"
    if node.op == "placeholder":
        return None
    for value in _leaves(node.meta["val"]):
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            return "its meta['val'] holds a real tensor"
    if not has_provenance(node):
        return "it has no provenance (use inherit() or edit.call())"
    return None


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        return value
    return (value,)


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def find_attribute(gm: nn.Module, path: str) -> Any:
    """What the dotted `path` names in `gm`, or None."""
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def _sentence(node: Node, fault: str, after: str) -> str:
    at = origin(node)
    where = " at ".join(part for part in (at.module_path, at.where) if part)
    return f"after {after}: node '{node.name}'" + (f" ({where})" if where else "") + f": {fault}"
