"""Verify: hold a graph to its stage's specification, after every pass.

Comes in: a graph and the stage it claims. Goes out: nothing, or a `VerificationError` that names the pass
that was running, the node, and the line of the user's model.

    verify(gm, Stage.folded, after="fold")
    -> VerificationError: after fold: node 'watch_3' (block.2.fc at model.py:41): an observer is left

One walk over the nodes: the cost is linear, also for a constant with thousands of users.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from ..formats import format
from .anchors import TARGETS
from .constants import VIEWS
from .edit import argument
from .note import note
from .provenance import has_provenance, origin
from .stages import SPECS, Spec, Stage, VerificationError, find_attribute, is_legal_function, operator_name


def verify(gm: GraphModule, stage: Stage, *, after: str = "") -> None:
    """Hold `gm` to its stage's specification. Raises VerificationError for the first node that breaks it."""
    spec = SPECS[stage]
    seen: set[Node] = set()
    names: set[str] = set()
    attributes: set[str] = set()
    ended = False
    for node in gm.graph.nodes:
        fault = _fault(gm, node, spec, seen, names, attributes) or _format_fault(node, stage)
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
    if not is_legal_function(node.target):
        return f"the Python function {node.target!r} is not an operator"
    gone = spec.gone.get(operator_name(node.target))
    if gone is not None:
        return gone
    return _value_fault(node)


def _format_fault(node: Node, stage: Stage) -> str | None:
    """What a stage promises of formats: an annotated weight has taken its own, and parts are complete."""
    if node.op != "call_function":
        return None
    wanted = note(node)
    if wanted is not None and wanted.weight and stage >= Stage.fake_quantized:
        _, _, index = TARGETS.get(node.target, ("", 0, -1))
        weight = _source(node.args[index]) if index >= 0 else None
        if weight is not None and weight.op == "get_attr" and weight.meta["val"].is_floating_point():
            return f"its weight was to become {wanted.weight}, but it still reads '{weight.target}'"
    if operator_name(node.target) == "bitfold::dequantize":
        parts, text = argument(node, "parts"), argument(node, "format")
        if isinstance(parts, (list, tuple)) and len(parts) != len(format(text).parts):
            return f"{text} has the parts {', '.join(format(text).parts)}, and it was given {len(parts)}"
    return None


def _source(operand: Any) -> Node | None:
    """What `operand` is a view or a cast of."""
    while isinstance(operand, Node) and operand.target in VIEWS:
        operand = operand.args[0]
    return operand if isinstance(operand, Node) else None


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


def _sentence(node: Node, fault: str, after: str) -> str:
    at = origin(node)
    where = " at ".join(part for part in (at.module_path, at.where) if part)
    return f"after {after}: node '{node.name}'" + (f" ({where})" if where else "") + f": {fault}"
