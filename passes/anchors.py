"""Anchors: the nodes whose weight can take a format, found in one walk over the graph.

In: a captured (normalized) graph. Out: an `Anchor` for each matmul, convolution or embedding with a
constant weight, whichever module or expression it came from, with the names it goes by and the weight's
operand.

    %w = get_attr[lm_head.weight]; %y = aten.linear(%x, %w)
    ->  Anchor(%y, "linear", op="head", layer="lm_head")

A format counts along the last dimension, the one that the anchor reduces over, so an operand is brought to
that form before it is quantized (`to_rows`) and back afterwards (`from_rows`): a convolution's weight is
reshaped to [O, I*kh*kw], the right-hand side of a bmm, or of a grouped product of experts, is transposed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .constants import Expression, expression
from .core import Miss, state
from .edit import call
from .provenance import module_path, origin
from .recipes import is_head
from .rules import Site

aten = torch.ops.aten

# target -> (kind, index of the input operand, index of the weight operand)
TARGETS: dict[object, tuple[str, int, int]] = {
    aten.linear.default: ("linear", 0, 1),
    aten.conv1d.default: ("conv1d", 0, 1),
    aten.conv1d.padding: ("conv1d", 0, 1),
    aten.conv2d.default: ("conv2d", 0, 1),
    aten.conv2d.padding: ("conv2d", 0, 1),
    aten.embedding.default: ("embedding", 1, 0),
    aten.bmm.default: ("bmm", 0, 1),
    aten.baddbmm.default: ("bmm", 1, 2),
    aten.matmul.default: ("bmm", 0, 1),
    aten._grouped_mm.default: ("grouped", 0, 1),
}
# Kinds whose weight is a batch of matrices [.., K, N].
BATCHED = ("bmm", "grouped")

# Kind of anchor -> what rules call it.
OPS = {
    **dict.fromkeys(("linear", *BATCHED), "linear"),
    "conv1d": "conv",
    "conv2d": "conv",
    "embedding": "embedding",
}

# Modules that have a weight of their own, be it tied to another's.
LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)

# What has a weight that a recipe could mean, and is not quantized yet: reported, never passed over.
UNTAKEN: dict[object, tuple[str, int, str]] = {
    aten.conv3d.default: ("conv", 1, "a convolution over three dimensions is not quantized"),
    aten.conv_transpose1d.default: ("conv", 1, "a transposed convolution is not quantized"),
    aten.conv_transpose2d.input: ("conv", 1, "a transposed convolution is not quantized"),
    aten.embedding_bag.padding_idx: ("embedding", 0, "an embedding bag is not quantized"),
    aten.addmm.default: ("linear", 2, "the matmul was not brought to aten.linear"),
    aten.mm.default: ("linear", 1, "the matmul was not brought to aten.linear"),
    aten.addmv.default: ("linear", 1, "addmv is not brought to aten.linear; write the product as linear"),
    aten.addbmm.default: ("linear", 2, "addbmm is not quantized; write the product as bmm"),
    aten.linalg_multi_dot.default: ("linear", 0, "multi_dot is not quantized; write it as products of two"),
    aten.index.Tensor: (
        "embedding",
        0,
        "a table indexed with brackets is not quantized; read it by F.embedding",
    ),
    aten.index_select.default: (
        "embedding",
        0,
        "index_select is not quantized; read the table by F.embedding",
    ),
    aten.bilinear.default: ("linear", 2, "a bilinear layer is not quantized"),
    aten.conv_transpose3d.input: ("conv", 1, "a transposed convolution is not quantized"),
    **{
        target: ("linear", index, "a recurrent layer is not quantized")
        for target, index in {
            aten.lstm.input: 2,
            aten.lstm.data: 3,
            aten.gru.input: 2,
            aten.gru.data: 3,
            aten.rnn_tanh.input: 2,
            aten.rnn_tanh.data: 3,
            aten.rnn_relu.input: 2,
            aten.rnn_relu.data: 3,
            aten.lstm_cell.default: 2,
            aten.gru_cell.default: 2,
            aten.rnn_tanh_cell.default: 2,
            aten.rnn_relu_cell.default: 2,
        }.items()
    },
}


@dataclass(frozen=True)
class Anchor:
    """One place where a constant weight meets an activation."""

    node: Node
    kind: str  # linear | conv1d | conv2d | embedding | bmm | grouped
    op: str  # as rules say it: linear | head | conv | embedding
    layer: str
    paths: tuple[str, ...]
    source: Expression  # the parameter that the weight is, and the views and casts it goes through
    input_index: int
    weight_index: int

    @property
    def tensor(self) -> Tensor:
        """The parameter's value."""
        return self.source.parameter

    @property
    def weight(self) -> Node:
        """The weight's operand, an expression of one parameter."""
        operand = self.node.args[self.weight_index]
        assert isinstance(operand, Node)
        return operand

    @property
    def input(self) -> Node:
        """The activation's operand."""
        operand = self.node.args[self.input_index]
        assert isinstance(operand, Node)
        return operand

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight as it is quantized: [..., K]."""
        return rows_shape(self.kind, self.weight)

    @cached_property
    def site(self) -> Site:
        """This anchor as a recipe's rules see it."""
        rows = math.prod(self.shape[:-1])
        return Site(self.paths, self.op, n=rows, k=self.shape[-1], numel=rows * self.shape[-1])


def anchors(gm: GraphModule, heads: Iterable[str] = ()) -> list[Anchor]:
    """Every anchor in graph order. Linear in the number of nodes.

    heads: paths of linears that are heads for a reason that this graph does not show.
    """
    seen = Modules(gm)
    found = [anchor for node in gm.graph.nodes if (anchor := _anchor(gm, node, seen)) is not None]
    tables = {identity(anchor.tensor) for anchor in found if anchor.kind == "embedding"}
    known = frozenset(heads)
    return [_with_head(anchor, tables, known) for anchor in found]


def untaken(gm: GraphModule) -> Iterator[tuple[Node, Site, Miss]]:
    """Nodes with a weight that no anchor describes: the node, how rules see it, the reason."""
    seen = Modules(gm)
    for node in gm.graph.nodes:
        if node.target in UNTAKEN:
            op, index, reason = UNTAKEN[node.target]
            operand = node.args[index] if len(node.args) > index else None
            if isinstance(operand, (list, tuple)):  # a recurrent layer's weights, the factors of a product
                operand = next((one for one in operand if _is_parameter(gm, one)), None)
            if isinstance(operand, Node) and _is_parameter(gm, operand):
                yield node, _site(gm, node, op, operand, seen), Miss(reason)
        elif node.target in TARGETS and _anchor(gm, node, seen) is None:
            found = _why_no_anchor(gm, node)
            if found is not None:
                operand, reason = found
                yield node, _site(gm, node, OPS[TARGETS[node.target][0]], operand, seen), Miss(reason)


def _why_no_anchor(gm: GraphModule, node: Node) -> tuple[Node, str] | None:
    """The operand that a person would call the weight, and why it is not taken; None if there is none."""
    kind, input_index, weight_index = TARGETS[node.target]
    left, right = node.args[input_index], node.args[weight_index]
    if kind in BATCHED:
        # The products inside an attention have no weight at all.
        if isinstance(left, Node) and _is_parameter(gm, left):
            return left, "its weight is the left operand; write it as linear, or on the right"
        return None
    if not isinstance(right, Node) or _holds_codes(right):
        return None
    source = expression(gm, right)
    if source is not None and isinstance(source.parameter, nn.Parameter):
        return right, "its weight is a sparse tensor, and only dense ones are quantized"
    if source is not None:
        return right, "its weight is a buffer, and only parameters are quantized"
    return right, "its weight is computed in each call, so there is nothing to store"


def _is_parameter(gm: GraphModule, operand: object) -> bool:
    source = expression(gm, operand) if isinstance(operand, Node) else None
    return source is not None and isinstance(source.parameter, nn.Parameter)


def _holds_codes(node: Node) -> bool:
    """Whether `node` is a weight that is folded already, as in a model that `bf.quantize` went over."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.target is torch.ops.bitfold.dequantize.default


def _site(gm: GraphModule, node: Node, op: str, weight: Node, seen: Modules) -> Site:
    source = expression(gm, weight)
    layer, paths = names_of(gm, node, source.path if source is not None else "", seen)
    n, *rest = (int(size) for size in weight.meta["val"].shape)
    return Site(paths or (layer,), op, n=n, k=math.prod(rest), numel=n * math.prod(rest))


def fixed_size(size: int | torch.SymInt) -> int | None:
    """The size as a number, or None if it varies from call to call. Puts no guard on it."""
    if isinstance(size, int):
        return size
    return int(size) if size.node.expr.is_number else None


def identity(tensor: Tensor) -> Hashable:
    """Equal for two tensors that are the same numbers in the same memory: how tied weights are known."""
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def names_of(gm: GraphModule, node: Node, parameter: str, seen: Modules) -> tuple[str, tuple[str, ...]]:
    """What to call the layer at `node`, and every path by which a rule may name it.

    A layer goes by its parameter's path less `.weight`, and by the module that it runs in. A module with a
    weight of its own that is tied to another's goes by its own path alone: each of the two has its own rule.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    user = state(gm).path(origin(node).module_path)
    owner = parameter.removesuffix(".weight")
    if not user or parameter == user or parameter.startswith(user + "."):
        return owner, tuple(dict.fromkeys(path for path in (owner, user) if path))
    if stack and _has_own_weight(seen, stack[-1], parameter):
        return user, (user,)
    return user, tuple(dict.fromkeys(path for path in (user, owner) if path))


def _has_own_weight(seen: Modules, user: Any, parameter: str) -> bool:
    """Whether the module at `user`, an entry of a module stack, holds the parameter under a name of its own.

    The graph says its kind only: one of torch's layers has a weight, and so has one of the owner's kind.
    What is left reads the weight of another module, as in `F.linear(x, self.embed.weight)`.
    """
    kind = user[1]
    cls = _class_named(kind) if isinstance(kind, str) else kind
    if isinstance(cls, type) and issubclass(cls, LAYERS):
        return True
    return (kind, parameter.rpartition(".")[0]) in seen.kinds


@dataclass(frozen=True)
class Modules:
    """The modules that a graph's nodes ran in, looked up once for all anchors."""

    gm: GraphModule

    @cached_property
    def kinds(self) -> frozenset[tuple[Any, str]]:
        """(kind, path in the model) of each."""
        entries = {
            entry
            for node in self.gm.graph.nodes
            for entry in (node.meta.get("nn_module_stack") or {}).values()
        }
        return frozenset((kind, state(self.gm).path(module_path(spelled))) for spelled, kind in entries)


def _class_named(dotted: str) -> object:
    """The class that `torch.export` wrote down as text, if its module is imported."""
    module, _, name = dotted.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _anchor(gm: GraphModule, node: Node, seen: Modules) -> Anchor | None:
    if node.op != "call_function" or node.target not in TARGETS:
        return None
    kind, input_index, weight_index = TARGETS[node.target]
    operand = node.args[weight_index]
    if not isinstance(operand, Node):
        return None
    source = expression(gm, operand)
    if source is None or (kind in BATCHED and operand.meta["val"].ndim < 3):
        return None
    # A buffer is a table of the model's own (rotary frequencies, a window), not a weight.
    if not isinstance(source.parameter, nn.Parameter) or source.parameter.layout is not torch.strided:
        return None
    layer, paths = names_of(gm, node, source.path, seen)
    return Anchor(node, kind, OPS[kind], layer, paths, source, input_index, weight_index)


def _with_head(anchor: Anchor, tables: set[Hashable], heads: frozenset[str]) -> Anchor:
    """The anchor, its op set to "head" if that is what it is."""
    if anchor.kind != "linear":
        return anchor
    tied = identity(anchor.tensor) in tables
    named = is_head(anchor.layer) or not heads.isdisjoint(anchor.paths)
    return replace(anchor, op="head") if tied or named else anchor


def rows_shape(anchor_kind: str, weight: Node) -> tuple[int, ...]:
    """The shape of the weight's operand with the reduced dimension last."""
    full = tuple(int(size) for size in weight.meta["val"].shape)
    if anchor_kind.startswith("conv"):
        return (full[0], math.prod(full[1:]))
    return (*full[:-2], full[-1], full[-2]) if anchor_kind in BATCHED else full


def to_rows(gm: GraphModule, anchor_kind: str, weight: Node, before: Node) -> Node:
    """The weight's operand in the form in which it is quantized: the reduced dimension last."""
    if anchor_kind.startswith("conv"):
        rows = (weight, list(rows_shape(anchor_kind, weight)))
        return call(gm, aten.reshape.default, rows, before=before, origin_from=before)
    if anchor_kind in BATCHED:
        return call(gm, aten.transpose.int, (weight, -2, -1), before=before, origin_from=before)
    return weight


def from_rows(gm: GraphModule, anchor_kind: str, rows: Node, like: Node, before: Node) -> Node:
    """Back to the shape that the anchor wants, which is that of `like`."""
    if anchor_kind.startswith("conv"):
        full = (rows, list(like.meta["val"].shape))
        return call(gm, aten.reshape.default, full, before=before, origin_from=before)
    if anchor_kind in BATCHED:
        return call(gm, aten.transpose.int, (rows, -2, -1), before=before, origin_from=before)
    return rows
