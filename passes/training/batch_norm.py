"""Train batch norm: what stands after a rounded convolution is folded into it, the way that trains.

In: a graph after `train_quantizers`. Out: the same, where each batch norm that alone reads a convolution (or
a product of rows) with a rounded weight is `fold_norm` before the rounding and `unfold_norm` after it.

    %y = conv2d(%x, rounded(%w), %b); %z = batch_norm(%y, %gamma, %beta, %mean, %var, False, 0.1, 1e-05, ..)
    ->  %n = bitfold.fold_norm(%rows, %b, %gamma, %beta, %mean, %var, 1e-05, False, %clock, 900)
        %y = conv2d(%x, rounded(%n[0]), %n[1])
        %z = bitfold.unfold_norm(%y, %n[2], %b, %gamma, %beta, %mean, %var, 0.1, 1e-05, False, %clock, 900)

`settle_batch_norm` replaces the three by parameters, whose numbers are those of `fold_batch_norm`. From the
step `freeze` on, training too normalizes by the running statistics, which then stand still.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...formats import BitfoldError, format
from ...formats.gradient import Gradient
from ...formats.norm import FOLD, UNFOLD
from ..anchors import TARGETS
from ..batch_norm import ROWS_FIRST, parameter_at
from ..cleanup import erase_dead_nodes
from ..constants import VIEWS, erase_dead_constants, expression
from ..core import Miss, Pass, report, state
from ..edges import edge
from ..edit import arguments, call
from ..provenance import inherit, origin
from ..stages import Stage, find_attribute
from .evaluated import FOLD_NORM, attribute_of, evaluated
from .quantizers import TRAIN_QUANTIZE, clock, learned_start

aten = torch.ops.aten
UNFOLD_NORM = torch.ops.bitfold.unfold_norm.default


@dataclass(frozen=True)
class TrainBatchNorm(Pass):
    """freeze: the step from which the running statistics stand still; -1: never; clip: as in
    `train_quantizers`; loaded: learned scales will be loaded, and need nothing to begin from."""

    name: ClassVar[str] = "train_batch_norm"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.fake_quantized,)
    produces: ClassVar[Stage | None] = None

    freeze: int = -1
    clip: bool = False
    loaded: bool = False

    def apply(self, gm: GraphModule) -> int:
        """Number of batch norms folded; what stays is reported. Raises BitfoldError, with nothing written,
        for learned scales that have nothing to begin from."""
        norms = gm.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
        roundings = {node: _rounding(gm, node) for node in norms}
        for node, found in roundings.items():
            if isinstance(found, Node) and not self.loaded:
                _check_start(gm, node, found)
        folded = 0
        for node, found in roundings.items():
            if not isinstance(found, Node):
                report(gm, node, found, asked=self.name)
                continue
            self._fold(gm, node, found)
            folded += 1
        erase_dead_nodes(gm)
        erase_dead_constants(gm)
        state(gm).mutated = None
        return folded

    def _fold(self, gm: GraphModule, node: Node, rounding: Node) -> None:
        conv, gamma, beta, mean, var, _, momentum, eps, _ = arguments(node)
        bias = conv.args[2] if len(conv.args) > 2 else None
        counts, freeze = (clock(gm, _device(gm)), self.freeze) if self.freeze >= 0 else (None, 0)
        # What the fold reads goes before the rounding that reads the fold.
        for read in (gamma, beta, mean, var, bias, counts):
            first = next(iter(gm.graph.nodes))
            if isinstance(read, Node) and read is not first:
                first.prepend(read)
        norm = (bias, gamma, beta, mean, var)
        rows = rounding.args[0]
        made = call(
            gm, FOLD_NORM, (rows, *norm, eps, False, counts, freeze), before=rounding, origin_from=node
        )
        new, shift, g = (
            call(gm, operator.getitem, (made, i), before=rounding, origin_from=node) for i in range(3)
        )
        rounding.update_arg(0, new)
        _learn_again(gm, rounding, made, self.clip)
        conv.args = (*conv.args[:2], shift, *conv.args[3:])
        args: Any = (conv, g, *norm, momentum, eps, False, counts, freeze)
        after = call(gm, UNFOLD_NORM, args, before=node, origin_from=node)
        node.replace_all_uses_with(after)
        gm.graph.erase_node(node)


def _rounding(gm: GraphModule, node: Node) -> Node | Miss:
    """The rounding of the weight before a batch norm, or why it stays."""
    conv, gamma, beta, mean, var, training, momentum, *_ = arguments(node)
    if training or mean is None or var is None:
        return Miss("it has no running statistics, or was captured in training mode")
    if conv.target not in ROWS_FIRST and not (
        conv.target is aten.linear.default and node.meta["val"].ndim == 2
    ):
        return Miss("no convolution or product of rows stands before it")
    if set(conv.users) != {node}:
        return Miss(f"'{conv.name}' is read by others too")
    if momentum == 0.0:
        return Miss("its running statistics are averages over all batches (momentum=None)")
    given = (gamma, beta, mean, var, *conv.args[2:3])
    if any(isinstance(value, Node) and value.op != "get_attr" for value in given):
        return Miss("its numbers are computed")
    weight: Any = conv.args[TARGETS[conv.target][2]] if conv.target in TARGETS else None
    while isinstance(weight, Node) and weight.target in VIEWS and len(weight.users) == 1:
        weight = weight.args[0]
    if not isinstance(weight, Node) or weight.target is not TRAIN_QUANTIZE or len(weight.users) != 1:
        return Miss("the weight before it is not rounded, or others read it")
    source: Any = weight.args[0]
    chain = expression(gm, source)
    if chain is None or not isinstance(chain.parameter, nn.Parameter):
        return Miss("the weight before it is no parameter")
    return weight


def _check_start(gm: GraphModule, node: Node, rounding: Node) -> None:
    """Raises BitfoldError if learned scales would begin at those of channels that gamma has erased: a scale
    of zeros is none for what gamma lets through later."""
    gamma = arguments(node)[1]
    if not isinstance(gamma, Node) or not Gradient.parse(str(rounding.args[2])).learns:
        return
    numbers, on = find_attribute(gm, str(gamma.target)), edge(rounding)
    if not numbers.is_meta and bool((numbers == 0).any()):
        raise BitfoldError(
            f"the batch norm behind layer {on.layer if on else ''} has zeros in its weight, and a channel of "
            "zeros gives a learned scale nothing to begin from; make them small numbers, or take "
            "weight='straight', or fold_norm=False"
        )


def _device(gm: GraphModule) -> torch.device:
    return next((p.device for p in gm.parameters()), torch.device("cpu"))


def _learn_again(gm: GraphModule, rounding: Node, made: Node, clip: bool) -> None:
    """Learned scales begin at the folded weight's."""
    held: Any = rounding.args[3]
    gradient = Gradient.parse(str(rounding.args[2]))
    if not held or not gradient.learns:
        return
    start = learned_start(format(str(rounding.args[1])), gradient, folded(gm, made)[0], clip)
    with torch.no_grad():
        for part, value in zip(held, start, strict=True):
            find_attribute(gm, str(part.target)).copy_(value)


def folded(gm: GraphModule, made: Node) -> list[Tensor]:
    """rows', bias' and g of a `fold_norm`, as evaluation has them now."""
    found = evaluated(made, attribute_of(gm))
    assert found is not None, f"{made.name} reads what is computed in a call"
    return list(found)


def switch_norms(gm: GraphModule, training: bool) -> int:
    """Let batch norms that are folded in normalize by their batch or by their running statistics, whatever
    the rest of the graph does; how many there are."""
    found = gm.graph.find_nodes(op="call_function", target=UNFOLD_NORM)
    for after in found:
        after.update_arg(UNFOLD["training"], training)
    for before in gm.graph.find_nodes(op="call_function", target=FOLD_NORM):
        before.update_arg(FOLD["training"], training)
    return len(found)


@dataclass(frozen=True)
class SettleBatchNorm(Pass):
    """Has no options. The other way: folded weights and biases become parameters."""

    name: ClassVar[str] = "settle_batch_norm"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.fake_quantized,)
    produces: ClassVar[Stage | None] = None

    def check(self, gm: GraphModule) -> None:
        """Raises BitfoldError for numbers that are none, which would become codes."""
        for node in gm.graph.find_nodes(op="call_function", target=FOLD_NORM):
            if not all(bool(part.isfinite().all()) for part in folded(gm, node)):
                layer = state(gm).path(origin(node).module_path)
                raise BitfoldError(
                    f"the weight, bias or batch norm of layer {layer} has NaN or infinity in it; training "
                    "diverged"
                )

    def apply(self, gm: GraphModule) -> int:
        """Number of batch norms that are gone. Raises BitfoldError for numbers that are none."""
        self.check(gm)
        nodes = gm.graph.find_nodes(op="call_function", target=FOLD_NORM)
        for after in gm.graph.find_nodes(op="call_function", target=UNFOLD_NORM):
            conv: Any = after.args[0]
            after.replace_all_uses_with(conv)
            gm.graph.erase_node(after)
            inherit(conv, [after])
        state(gm).mutated = None
        for node in nodes:
            self._settle(gm, node)
        erase_dead_nodes(gm)
        erase_dead_constants(gm)
        return len(nodes)

    def _settle(self, gm: GraphModule, node: Node) -> None:
        rows, bias, _ = folded(gm, node)
        source: Any = node.args[0]
        chain = expression(gm, source)
        assert chain is not None
        path = str(chain.source.target)
        # Rows are a view of the weight; the parameter that takes its place has the weight's shape.
        shape = chain.parameter.shape
        new = parameter_at(gm, path, rows.reshape(shape), node)
        view = new
        if tuple(rows.shape) != tuple(shape):
            view = call(gm, aten.reshape.default, (new, list(rows.shape)), before=node, origin_from=node)
        owner = path.rpartition(".")[0]
        added = parameter_at(gm, f"{owner}.bias" if owner else "bias", bias, node)
        for read in list(node.users):
            read.replace_all_uses_with(view if read.args[1] == 0 else added)
