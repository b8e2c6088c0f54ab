"""Fold: floats become codes and scales.

In: an annotated, calibrated or fake-quantized graph. Out: the backend-neutral reference form. Weights are
constants in one canonical layout (`fc_weight_codes`, `fc_weight_scales`, ..) behind a `dequantize`, once
for tied weights; activations go through `quantize` and `dequantize`. The values are those of the
fake-quantized graph, bit for bit.

    %f = bitfold.fake_quantize(%fc_weight, "int8")
    ->  %w = bitfold.dequantize([%fc_weight_codes, %fc_weight_scales], "int8", 64, f32)

    %f = bitfold.fake_quantize(%x, "int8")
    ->  %q = bitfold.quantize(%x, "int8"); %w = bitfold.dequantize([%q[0], %q[1]], "int8", 64, f32)

A float weight that nothing else uses is dropped from the graph's module as soon as its codes are there, so
that at no time more than one layer is held twice. In the frame scope the user's parameters are only read.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..formats import BitfoldError, Format, Quantized, format
from .algorithms.draft import DRAFT
from .anchors import fixed_size, identity
from .constants import (
    Expression,
    Step,
    add_constant,
    applied,
    constant,
    erase_dead_constants,
    expression,
    is_pure,
)
from .core import Pass, state
from .edges import EDGE, Edge, edge
from .edit import fake_mode
from .provenance import inherit
from .stages import Stage
from .training.fake_quantize import FAKE_QUANTIZE, ROUNDED, check_observers, mark_edges

aten = torch.ops.aten
QUANTIZE = torch.ops.bitfold.quantize.default
DEQUANTIZE = torch.ops.bitfold.dequantize.default


class FoldError(BitfoldError, RuntimeError):
    """Folding stopped midway; the message says at which layer, what is folded, and how to go on."""


@dataclass(frozen=True)
class Fold(Pass):
    """Has no options: formats come from the annotations, or from the fake-quantize nodes."""

    name: ClassVar[str] = "fold"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (
        Stage.annotated,
        Stage.observed,
        Stage.fake_quantized,
    )
    produces: ClassVar[Stage | None] = Stage.folded

    def apply(self, gm: GraphModule) -> int:
        """Number of edges folded. Raises BitfoldError, with nothing written, for an observer without data."""
        check_observers(gm)
        erase_dead_constants(gm)
        mark_edges(gm)
        marked = [node for node in gm.graph.nodes if node.target is FAKE_QUANTIZE]
        folder = _Folder(gm)
        for done, node in enumerate(marked):
            on = edge(node) or Edge(node.name, "weight", str(node.args[1]))
            try:
                folder.fold(node, on)
            except (MemoryError, RuntimeError, OSError) as error:
                raise FoldError(
                    f"folding stopped at the {on.which} of layer {on.layer} after {done} of {len(marked)} "
                    f"edges: {error}; what is before it holds codes, the rest is float and whole, "
                    "and running fold again goes on from there"
                ) from error
        erase_dead_constants(gm)
        return len(marked)


def _maker(fmt: Format, steps: Sequence[Step], draft: Any) -> Callable[[Tensor], Quantized]:
    """From a parameter to its codes. It holds nothing of the graph and no parameter: codes are kept by
    parameter, for as long as that lives, and this is kept beside them."""

    def make(parameter: Tensor) -> Quantized:
        with torch.no_grad():
            if draft is not None:
                return draft if isinstance(draft, Quantized) else draft.quantized(fmt)
            return fmt.quantize(applied(steps, parameter).contiguous())

    return make


class _Folder:
    """What is shared while one graph is folded: the constants made so far, and who uses the old ones."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.made: dict[Hashable, tuple[list[Node], int]] = {}
        self.fakes: dict[Hashable, list[Tensor]] = {}
        self.uses = Counter(str(node.target) for node in gm.graph.nodes if node.op == "get_attr")
        # Frame scope: parameters are placeholders, and stay.
        self.frees = state(gm).scope != "frame"

    def fold(self, node: Node, on: Edge) -> None:
        """Replace one fake-quantize node."""
        source = node.args[0]
        assert isinstance(source, Node)
        chain = expression(self.gm, source)
        masked = constant(self.gm, source) if chain is None and on.which == "weight" else None
        if chain is None and masked is None:
            new = self.activation(node, source)
        else:
            new = self.weight(node, source, on, chain, masked)
        new.meta[EDGE] = on
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)
        self.release(source)

    def weight(
        self, node: Node, source: Node, on: Edge, chain: Expression | None, masked: Tensor | None
    ) -> Node:
        """`dequantize` of constants: codes and scales of the weight's value."""
        text = str(node.args[1])
        key: Hashable = (identity(chain.parameter), chain.text, text) if chain else (source, text)
        if key not in self.made:
            codes = self.codes(on, chain, masked, node)
            name = self.name(chain, on)
            parts = zip(codes.format.parts, codes.parts, strict=True)
            held = [add_constant(self.gm, f"{name}_{part}", tensor, like=node) for part, tensor in parts]
            self.made[key] = (held, codes.k)
        held, k = self.made[key]
        return self.dequantize(node, held, text, k)

    def codes(self, on: Edge, chain: Expression | None, masked: Tensor | None, node: Node) -> Quantized:
        text = str(node.args[1])
        here, fmt = state(self.gm), format(text)
        if on.stored:
            return here.stored[on.stored]
        if chain is None:
            assert masked is not None
            return fmt.quantize(masked)
        make = _maker(fmt, chain.steps, node.meta.get(DRAFT))
        if here.store is not None:
            return here.store.folded(chain.parameter, chain.text, text, make)
        return make(chain.parameter)

    def name(self, chain: Expression | None, on: Edge) -> str:
        """What constants are called: the parameter's path as the captured module says it."""
        path = chain.path if chain else f"{on.layer}.weight"
        return state(self.gm).local(path)

    def activation(self, node: Node, source: Node) -> Node:
        """`quantize`, its parts, and `dequantize`: the values move as codes between the two."""
        graph, text = self.gm.graph, str(node.args[1])
        value = source.meta["val"]
        name = node.name.removesuffix(ROUNDED)
        with graph.inserting_before(node):
            quantize = graph.create_node(
                "call_function", QUANTIZE, (source, *node.args[1:]), name=f"{name}_quantized"
            )
            quantize.meta["val"] = self.parts_of(value, text)
            parts = [
                graph.create_node("call_function", operator.getitem, (quantize, i), name=f"{name}_{part}")
                for i, part in enumerate(format(text).parts)
            ]
        for part, fake in zip(parts, quantize.meta["val"], strict=True):
            part.meta["val"] = fake
        for new in (quantize, *parts):
            inherit(new, [node])
        return self.dequantize(node, parts, text, self.length(value, source, node))

    def dequantize(self, node: Node, parts: list[Node], text: str, k: int | Node) -> Node:
        value = node.meta["val"]
        name = f"{node.name.removesuffix(ROUNDED)}_dequantized"
        with self.gm.graph.inserting_before(node):
            new = self.gm.graph.create_node(
                "call_function", DEQUANTIZE, (parts, text, k, value.dtype), name=name
            )
        new.meta["val"] = value
        return inherit(new, [node])

    def parts_of(self, value: Tensor, text: str) -> list[Tensor]:
        """Fake parts of a fake activation; alike ones share them, since each costs a hundred operators."""
        key = (tuple(str(size) for size in value.shape), value.dtype, value.device, text)
        if key not in self.fakes:
            with fake_mode(self.gm), torch.no_grad():
                self.fakes[key] = list(QUANTIZE(value, text))
        return self.fakes[key]

    def length(self, value: Tensor, source: Node, before: Node) -> int | Node:
        """The last dimension of an activation, as a node where it varies."""
        k = fixed_size(value.shape[-1])
        if k is not None:
            return k
        with self.gm.graph.inserting_before(before):
            node = self.gm.graph.call_function(aten.sym_size.int, (source, value.ndim - 1))
        node.meta["val"] = value.shape[-1]
        return inherit(node, [before])

    def release(self, node: Node) -> None:
        """Erase what only the folded weight used, and let go of the float tensor behind it."""
        pending = [node]
        while pending:
            old = pending.pop()
            if old.users or not (old.op == "get_attr" or is_pure(old)):
                continue
            pending.extend(old.all_input_nodes)
            self.gm.graph.erase_node(old)
            if old.op == "get_attr":
                self.forget(str(old.target))

    def forget(self, target: str) -> None:
        self.uses[target] -= 1
        if self.uses[target] or not self.frees:
            return
        owner, _, name = target.rpartition(".")
        delattr(self.gm.get_submodule(owner), name)
