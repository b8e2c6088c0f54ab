"""The error that quantization brought to each value: the captured and the rewritten graph on the same input.

Comes in: the graph before, the graph after, and the inputs of both. Goes out: node name -> `NodeError`.

    reference, gm = capture(model, inputs), capture(model, inputs)
    Pipeline.parse("annotate{recipe=int4},fold").run(gm)
    node_errors(reference, gm, inputs)["linear_5"].sqnr_db  ->  24.8

The figures are cumulative: a node is fed what the quantized graph computed so far. `isolated_db` is what the
node does by itself: fed the unquantized model's values, its own codes and its own rounding are all that
differs. A node is compared with the one of its own name, or else with the last of the captured nodes that it
stands for (a fused region has its tail's)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...formats.errors import BitfoldError
from ...lowering.signal_to_noise import difference, finite, signal_to_noise
from ...passes.provenance import FROM_KEY
from ..held import as_it_was
from .watch import Watched

_KERNELS = (torch.ops.bitfold.fused.default, torch.ops.bitfold.conv.default)


@dataclass(frozen=True)
class NodeError:
    """How far one value is from the unquantized model's.

    `sqnr_db`: signal to noise as `bf.diagnose` has it (`lowering/signal_to_noise.py`); infinite when equal.
    `max_abs`: the largest absolute difference. `max_rel`: that, divided by the reference's largest absolute
    value. `reference`: the node of the unquantized graph. `isolated_db`: the ratio on unquantized inputs.
    """

    sqnr_db: float
    max_abs: float
    max_rel: float
    reference: str
    isolated_db: float = math.nan

    def as_json(self) -> dict[str, Any]:
        """Numbers as JSON can hold them: infinity and NaN become text."""
        numbers = {
            "sqnr_db": self.sqnr_db,
            "isolated_db": self.isolated_db,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
        }
        return {key: _json_number(value) for key, value in numbers.items()} | {"reference": self.reference}


def node_errors(
    before: GraphModule,
    after: GraphModule,
    inputs: Sequence[Any],
    *,
    see: Callable[[Node, Any], None] | None = None,
) -> dict[str, NodeError]:
    """Run both graphs on `inputs` and compare every floating-point value that both of them have. `see` is
    shown every value of the graph after.

    Holds the compared values of `before` in memory for one run. Raises BitfoldError if the two graphs do not
    take the same inputs.
    """
    taken = [[node.name for node in gm.graph.nodes if node.op == "placeholder"] for gm in (before, after)]
    if len(taken[0]) != len(taken[1]):
        raise BitfoldError(
            f"the graphs to compare take {len(taken[0])} and {len(taken[1])} inputs; "
            "capture the reference from the same model with the same inputs"
        )
    order = {node.name: i for i, node in enumerate(before.graph.nodes) if node.op.startswith("call_")}
    partners = {node: name for node in _calls(after) if (name := _partner(node, order))}
    wanted = set(partners.values())
    kept: dict[str, Tensor] = {}
    found: dict[str, NodeError] = {}

    def keep(node: Node, value: Any, _: Any) -> None:
        if node.name in wanted and _comparable(value):
            kept[node.name] = value.detach().clone()  # a later in-place write must not reach it

    def given(node: Node) -> Tensor | None:
        return kept.get(partners.get(node, ""))

    def compare(node: Node, value: Any, alone: Any) -> None:
        if see is not None:
            see(node, value)
        reference = given(node) if node.op.startswith("call_") else None
        if reference is not None and _comparable(value) and value.shape == reference.shape:
            name = partners[node]
            isolated = _error(reference, alone, name).sqnr_db
            # A kernel's own result, inside of a region, is told by the name of what it computes.
            key = node.name if node.op == "call_module" else name
            found[key] = replace(_error(reference, value, name), isolated_db=isolated)

    # The two share what the model holds: a counter that one of them moves on is no error of the other.
    with torch.no_grad():
        with as_it_was(before, inputs):
            Watched(before, keep).run(*inputs)
        with as_it_was(after, inputs):
            Watched(after, compare, given).run(*inputs)
    return found


def _calls(gm: GraphModule) -> Iterator[Node]:
    """Every operation of the graph and of the regions outlined in it (their nodes keep their names)."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(region := gm.get_submodule(str(node.target)), GraphModule):
            yield from _calls(region)
        if node.op.startswith("call_"):
            yield node


def _partner(node: Node, order: Mapping[str, int]) -> str | None:
    """The node of the graph before that has the value this one should have."""
    # A node that a pass made has the name of a captured one by chance only.
    if node.name in order and FROM_KEY not in node.meta:
        return node.name
    stands_for = node.op == "call_module" or _is_result(node)
    origins = [name for name in node.meta.get(FROM_KEY, ()) if stands_for and name in order]
    return max(origins, key=order.__getitem__, default=None)


def _is_result(node: Node) -> bool:
    """Whether it is what a kernel computes, not codes or scales on their way there."""
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, Node):
        return source.target in _KERNELS and bool(node.args[1] == 0)
    return node.target is torch.ops.bitfold.cpu_linear.default


def _comparable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _error(reference: Tensor, value: Tensor, name: str) -> NodeError:
    largest = difference(reference, value).abs().max().item()
    top = finite(reference).abs().max().item()
    return NodeError(signal_to_noise(reference, value), largest, _ratio(largest, top), name)


def _ratio(largest: float, top: float) -> float:
    if largest == 0.0:
        return 0.0
    return largest / top if top > 0.0 else math.inf


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else {math.inf: "infinite", -math.inf: "-infinite"}.get(value, "NaN")
