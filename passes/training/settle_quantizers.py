"""Settle quantizers: what training moved stands still, and the graph is one that `fold` takes.

In: a graph after `train_quantizers`. Out: `bitfold.fake_quantize` in place of each `train_quantize`, with the
same values in every bit, and the learned numbers as stored scales.

    %f = bitfold.train_quantize(%x, "int8[tensor]", "clip", [%input_low, %input_high], ..)
    ->  %f = bitfold.fake_quantize(%x, "int8[tensor]", [%input_scales])

    %f = bitfold.train_quantize(%w, "int2[g32]", "lsq", [%weight_step], ..)
    ->  %f = bitfold.fake_quantize(%w, "int2[g32]"), its codes those of the learned step

Codes under learned scales reach `fold` the way that a checkpoint's own do (`State.stored`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...formats import BitfoldError, format
from ...formats.gradient import Gradient
from ...formats.train_quantize import params
from ..constants import add_constant, erase_dead_constants, expression
from ..core import Pass, state
from ..edges import EDGE, Edge, edge
from ..provenance import inherit
from ..stages import Stage, find_attribute
from .fake_quantize import FAKE_QUANTIZE
from .quantizers import OBSERVE_RANGE, TRAIN_QUANTIZE, read_now


@dataclass(frozen=True)
class SettleQuantizers(Pass):
    """Has no options."""

    name: ClassVar[str] = "settle_quantizers"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.fake_quantized,)
    produces: ClassVar[Stage | None] = None

    def apply(self, gm: GraphModule) -> int:
        """Number of edges. Raises BitfoldError, with nothing written, for a range that saw no data."""
        self.check(gm)
        nodes = gm.graph.find_nodes(op="call_function", target=TRAIN_QUANTIZE)
        for node in nodes:
            _settle(gm, node)
        for node in gm.graph.find_nodes(op="call_function", target=OBSERVE_RANGE):
            gm.graph.erase_node(node)
        for node in gm.graph.find_nodes(op="get_attr"):
            if not node.users:
                gm.graph.erase_node(node)
        erase_dead_constants(gm)
        state(gm).mutated = None
        return len(nodes)

    def check(self, gm: GraphModule) -> None:
        """Raises BitfoldError for what `apply` would refuse."""
        for node in gm.graph.find_nodes(op="call_function", target=TRAIN_QUANTIZE):
            _check(gm, node)


def _held(gm: GraphModule, node: Node) -> list[Tensor]:
    parts: Any = node.args[3]
    return [find_attribute(gm, str(part.target)).detach() for part in parts]


def _on(node: Node) -> Edge:
    found = edge(node)
    assert found is not None, f"{node.name} stands on no edge"
    return found


def _check(gm: GraphModule, node: Node) -> None:
    held, on = _held(gm, node), _on(node)
    source: Any = node.args[0]
    chain = expression(gm, source) if on.which == "weight" else None
    numbers = torch.zeros(1) if chain is None or not chain.parameter.numel() else chain.parameter.detach()
    if not all(bool(end.isfinite()) for end in torch.aminmax(numbers)):
        raise BitfoldError(f"the weight of layer {on.layer} has NaN or infinity in it; training diverged")
    where = f"the {on.which} of layer {on.layer}"
    if not all(bool(torch.isfinite(part).all()) for part in held):
        raise BitfoldError(
            f"the range or scales of {where} are not finite: no data went through it in training, or "
            "training diverged; calibrate, or train on"
        )
    if len(held) == 2 and not Gradient.parse(str(node.args[2])).learns and bool((held[0] > held[1]).any()):
        raise BitfoldError(f"the range of {where} is empty; calibrate, or train on batches that reach it")


def _settle(gm: GraphModule, node: Node) -> None:
    source, text, gradient = node.args[:3]
    assert isinstance(source, Node)
    on, fmt = _on(node), format(str(text))
    with torch.no_grad():
        scales = params(fmt, Gradient.parse(str(gradient)), _held(gm, node))
    args: tuple[Any, ...] = (source, text)
    if scales is not None and on.which == "weight":
        key = f"learned:{node.name}"
        with torch.no_grad():
            state(gm).stored[key] = fmt.quantize(read_now(gm, source), scales)
        on = replace(on, stored=key)
    elif scales is not None:
        layer = state(gm).local(on.layer)
        label = "_".join(word for word in (layer, on.which) if word)
        made = [
            add_constant(gm, f"{label}_{name}", part, like=node)
            for name, part in zip(fmt.params_names, scales, strict=True)
        ]
        args = (*args, made)
    with gm.graph.inserting_before(node):
        name = node.name.removesuffix("_trained")
        new = gm.graph.create_node("call_function", FAKE_QUANTIZE, args, name=name)
    new.meta["val"], new.meta[EDGE] = node.meta["val"], on
    inherit(new, [node])
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
