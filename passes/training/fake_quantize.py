"""Fake quantize: round every annotated edge to its format while it stays a float with a gradient (QAT).

In: an annotated or observed graph. Out: a `bitfold.fake_quantize` on each annotated edge, weights included,
that gives the values the folded graph will have, bit for bit, and lets the gradient straight through.

    %y = aten.linear(%x, %w)    ->    %f = bitfold.fake_quantize(%w, "int4[g128]"); %y = aten.linear(%x, %f)

An observer becomes scales and goes. A weight that `sparsify` marked is multiplied by its mask first, so
that pruned weights stay pruned in training. `fold` begins with the same step, which is why the two agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from ...formats import BitfoldError, format
from ..algorithms.draft import DRAFT
from ..anchors import TARGETS, from_rows, to_rows
from ..constants import add_constant, expression
from ..core import Pass, state
from ..edges import EDGE, Edge, edge, split_activations
from ..edit import call
from ..joints import operands
from ..note import KEY, Note, annotated
from ..observing.observers import Observer
from ..provenance import inherit
from ..stages import Stage, find_attribute

aten = torch.ops.aten
FAKE_QUANTIZE = torch.ops.bitfold.fake_quantize.default
ROUNDED = "_rounded"
"""How the name of a fake-quantize node ends: `fc_weight_rounded`."""
SEEN_BY = "bitfold_observer"
"""In the meta of a fake-quantize node that was an observer: that observer, whose range may train on."""


@dataclass(frozen=True)
class FakeQuantize(Pass):
    """Has no options: the annotations say everything."""

    name: ClassVar[str] = "fake_quantize"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.annotated, Stage.observed)
    produces: ClassVar[Stage | None] = Stage.fake_quantized

    def apply(self, gm: GraphModule) -> int:
        """Number of edges. Raises BitfoldError, with nothing written, for an observer that saw no data."""
        check_observers(gm)
        for node, note in annotated(gm):
            # Weights that will train leave the codes that they came with, or that an algorithm found.
            node.meta[KEY] = replace(note, stored="")
            node.meta.pop(DRAFT, None)
        made = mark_edges(gm)
        return made + _mask_weights(gm)


def mark_edges(gm: GraphModule) -> int:
    """Put a fake-quantize node on every annotated edge that has none yet, observers' edges included."""
    made = sum(_settle(gm, node) for node in list(gm.graph.nodes))
    made += split_activations(gm, lambda on, value, before: _fake_quantize(gm, on, value, before))
    shared: dict[tuple[Node, str], Node] = {}
    for node, note in annotated(gm):
        made += _mark_weight(gm, node, note, shared)
    return made


def check_observers(gm: GraphModule) -> None:
    """Raises BitfoldError if a calibrated edge has no observer, or one that saw nothing."""
    for node in gm.graph.nodes:
        on, observer = edge(node), _observer_at(gm, node)
        if on is not None and observer is not None and observer.seen == 0:
            raise BitfoldError(
                f"the observer at the {on.which} of layer {on.layer} saw no data; "
                "run calibrate(gm, batches) first"
            )
    _check_joints(gm)
    for node, note in annotated(gm):
        if note.observer and not _has_ranges(node, note):
            raise BitfoldError(
                f"layer {note.layer} takes calibrated ranges and has no observer; "
                "run the pass observe and calibrate(gm, batches) first"
            )


def _check_joints(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        wanted = operands(node)
        values = [] if wanted is None else [node.args[place] for place in wanted.places]
        if (
            wanted is not None
            and wanted.observer
            and not all(isinstance(value, Node) and edge(value) is not None for value in values)
        ):
            raise BitfoldError(
                f"{wanted.kind} {node.name} takes calibrated ranges and has no observer; run the pass "
                "observe and calibrate(gm, batches) first"
            )


def _has_ranges(node: Node, note: Note) -> bool:
    source = node.args[TARGETS[node.target][1]]
    read = not note.input or (isinstance(source, Node) and edge(source) is not None)
    return read and (not note.output or any(edge(user) for user in node.users))


def _observer_at(gm: GraphModule, node: Node) -> Observer | None:
    if node.op != "call_module":
        return None
    found = find_attribute(gm, str(node.target))
    return found if isinstance(found, Observer) else None


def _settle(gm: GraphModule, node: Node) -> int:
    """Replace an observer by a fake-quantize node with the scales that follow from its range."""
    on, observer = edge(node), _observer_at(gm, node)
    if on is None or observer is None:
        return 0
    value = node.args[0]
    assert isinstance(value, Node)
    fmt = format(on.format)
    shape = [1] * value.meta["val"].ndim
    device = value.meta["val"].device
    params = [
        add_constant(gm, f"{on.layer}_{on.which}_{name}", part.reshape(shape).to(device), like=node)
        for name, part in zip(fmt.params_names, observer.params(fmt), strict=True)
    ]
    new = _fake_quantize(gm, on, value, node, params)
    new.meta[EDGE], new.meta[SEEN_BY] = on, observer
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    gm.delete_submodule(str(node.target))
    return 1


def _mark_weight(gm: GraphModule, node: Node, note: Note, shared: dict[tuple[Node, str], Node]) -> int:
    if not note.weight:
        return 0
    index = TARGETS[node.target][2]
    weight = node.args[index]
    assert isinstance(weight, Node)
    if expression(gm, weight) is None:  # it is marked or folded already
        return 0
    on = Edge(note.layer, "weight", note.weight, stored=note.stored)
    known = (weight, note.weight)
    if known not in shared:
        rows = to_rows(gm, note.anchor, weight, node)
        marked = _fake_quantize(gm, on, rows, node)
        marked.meta[EDGE] = on
        if DRAFT in node.meta:
            marked.meta[DRAFT] = node.meta.pop(DRAFT)
        shared[known] = from_rows(gm, note.anchor, marked, weight, node)
    node.update_arg(index, shared[known])
    return 1


def _fake_quantize(
    gm: GraphModule, on: Edge, value: Node, before: Node, params: list[Node] | None = None
) -> Node:
    # By the module's own name for it, so that the graphs of layers that are alike are alike.
    layer = state(gm).local(on.layer).replace(".", "_").removesuffix(f"{on.which}")
    name = f"{layer.rstrip('_')}_{on.which}{ROUNDED}".lstrip("_")
    if on.which != "output":  # which stands right behind its layer; `quantize` and `train_quantize` see to it
        value = _contiguous(gm, value, before)
    args: tuple[Argument, ...] = (value, on.format, *([params] if params else []))
    with gm.graph.inserting_before(before):
        node = gm.graph.create_node("call_function", FAKE_QUANTIZE, args, name=name)
    # The same shape and dtype: computing it through the decomposition would cost a hundred fake operators.
    node.meta["val"] = value.meta["val"]
    return inherit(node, [value if on.which == "output" else before])


def _contiguous(gm: GraphModule, value: Node, before: Node) -> Node:
    """`value` with its last dimension innermost in memory, as codes are.

    A matmul adds in another order for other strides, and trained and folded outputs agree in every bit.
    """
    fake = value.meta["val"]
    dense = [1]
    for size in reversed(fake.shape[1:]):
        dense.append(dense[-1] * size)
    # Compared as text: asking a symbolic size for equality would put a guard on it.
    if [str(step) for step in reversed(fake.stride())] == [str(step) for step in dense[: fake.ndim]]:
        return value
    return call(gm, aten.contiguous.default, (value,), before=before, origin_from=before)


def _mask_weights(gm: GraphModule) -> int:
    """Multiply each sparse weight by the mask of its largest magnitudes as they are now."""
    made = 0
    for node in list(gm.graph.nodes):
        on = edge(node)
        if on is None or on.which != "weight" or "indices" not in format(on.format).parts:
            continue
        rows = node.args[0]
        source = expression(gm, rows)
        if source is None:
            continue
        numbers = source.apply(source.parameter)
        # Truth values, which no `.to(dtype)` of the model turns into another dtype than the weight's.
        mask = format(on.format).sparsity.mask(numbers)
        held = add_constant(gm, f"{source.path.removesuffix('.weight')}_mask", mask, like=node)
        node.update_arg(0, call(gm, aten.mul.Tensor, (rows, held), before=node, origin_from=node))
        made += 1
    return made
