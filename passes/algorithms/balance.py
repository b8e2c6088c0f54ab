"""Balance: a channel made smaller where it is produced and larger where it is read, or the other way around.

In: the graph of a block. Out: its groups: linears that read one tensor, and the parameters that make that
tensor channel by channel. For any positive s the block computes the same with the producers divided by s and
the readers' columns multiplied by it; which s makes rounding cheapest is what AWQ, SmoothQuant and
equalization differ in.

    %y = rms_norm(%x, [256], %w); %q = linear(%y, %wq); %k = linear(%y, %wk)
    ->  Group(readers=(wq, wk), producers=(w: vector))

A producer is found through what treats every channel alike: casts, copies, an activation that is linear for
positive factors (relu), a product with something else, attention (which mixes tokens, not channels of a
head).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...formats import Format
from ..anchors import TARGETS
from ..constants import expression
from .inputs import Inputs
from .on_model import OnModel, Place

aten = torch.ops.aten

_ALIKE = frozenset(
    {
        *(aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default),
        *(aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default),
        *(aten.dropout.default, aten.relu.default, aten.relu_.default, aten.leaky_relu.default),
    }
)
_NORMS = {aten.rms_norm.default: (2,), aten.layer_norm.default: (2, 3)}
_RESHAPES = frozenset(
    {aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten._unsafe_view.default}
)


@dataclass(frozen=True)
class Producer:
    """A parameter whose numbers (vector) or rows stand for the channels of a group."""

    path: str
    kind: Literal["vector", "rows"]


@dataclass(frozen=True)
class Group:
    """readers: the weights' paths; producers: what makes their input; width: how many factors may be chosen;
    index: which factor a channel has, where several share one (queries over fewer heads of values)."""

    readers: tuple[str, ...]
    producers: tuple[Producer, ...]
    width: int
    index: tuple[int, ...] | None = None

    def spread(self, factors: Tensor) -> Tensor:
        """A factor for each channel of the readers, [K]."""
        if self.index is None:
            return factors
        return factors[torch.tensor(self.index, device=factors.device)]

    def largest(self, channels: Tensor) -> Tensor:
        """For each factor, the largest of its channels' numbers [K]."""
        if self.index is None:
            return channels
        place = torch.tensor(self.index, device=channels.device)
        return channels.new_zeros(self.width).scatter_reduce(0, place, channels, "amax")


@dataclass(frozen=True)
class Weights:
    """What a balancer looks at: the readers' weights [N, K] with their formats (None: not quantized), the
    weights that
    produce the channels, and the inputs, if it asked for them."""

    group: Group
    readers: Sequence[tuple[Tensor, Format | None]]
    rows: Sequence[Tensor]
    inputs: Inputs | None


@dataclass(frozen=True)
class Balancer(OnModel):
    """Chooses factors; `lowering` applies them to a model's blocks, before codes are decided."""

    place: ClassVar[Place] = "block before"
    needs_inputs: ClassVar[bool] = False

    @abstractmethod
    def factors(self, weights: Weights) -> Tensor | None:
        """Positive factors [width], or None where balancing does not help."""


def groups(gm: GraphModule) -> list[Group]:
    """The groups of a captured block, in graph order."""
    found = []
    seen: set[Node] = set()
    for node in gm.graph.nodes:
        source = node.args[0] if node.target is aten.linear.default else None
        if not isinstance(source, Node) or source in seen:
            continue
        seen.add(source)
        readers = [_weight(gm, user) for user in source.users]
        if None in readers:
            continue
        k = int(source.meta["val"].shape[-1])
        made = _producers(gm, source, k)
        if made is not None:
            producers, width, index = made
            found.append(Group(tuple(path for path in readers if path), producers, width, index))
    return found


def _weight(gm: GraphModule, node: Node) -> str | None:
    """The path of a linear's weight, if it is a parameter as it is."""
    if node.target is not aten.linear.default:
        return None
    return parameter_path(gm, node.args[TARGETS[node.target][2]])


def parameter_path(gm: GraphModule, operand: object) -> str | None:
    """The path of an operand that is a parameter as it is, copied or cast."""
    chain = expression(gm, operand) if isinstance(operand, Node) else None
    if chain is None or any(step[0] not in _ALIKE for step in chain.steps):
        return None
    return chain.path if isinstance(chain.parameter, torch.nn.Parameter) else None


_Made = tuple[tuple[Producer, ...], int, tuple[int, ...] | None]


def _producers(gm: GraphModule, node: Node, k: int) -> _Made | None:
    """What makes the channels of `node`, whose every user is accounted for."""
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        return _rows(gm, node, k)
    if node.target in _NORMS:
        operands = [node.args[at] for at in _NORMS[node.target] if len(node.args) > at]
        paths = [parameter_path(gm, one) for one in operands if one is not None]
        if not paths or None in paths:
            return None
        return tuple(Producer(path, "vector") for path in paths if path), k, None
    if node.target is aten.mul.Tensor:
        return _product(gm, node, k)
    if node.target in _ALIKE:
        return _alone(gm, node.args[0], k)
    if node.target in _RESHAPES:
        return _attention(gm, node, k)
    return None


def _alone(gm: GraphModule, node: object, k: int) -> _Made | None:
    """The producers of a node that has no other user."""
    if not isinstance(node, Node) or len(node.users) != 1 or int(node.meta["val"].shape[-1]) != k:
        return None
    return _producers(gm, node, k)


def _product(gm: GraphModule, node: Node, k: int) -> _Made | None:
    if node.args[0] is node.args[1]:  # a square has one user where its operand is used twice
        return None
    for operand in node.args:
        path = parameter_path(gm, operand)
        if path is not None and isinstance(operand, Node):
            vector = operand.meta["val"].ndim == 1 and int(operand.meta["val"].shape[0]) == k
            return ((Producer(path, "vector"),), k, None) if vector else None
    for operand in reversed(node.args):
        made = _alone(gm, operand, k) if _linear(operand) else None
        if made is not None:
            return made
    return None


def _linear(node: object) -> bool:
    """Whether the way back to a linear is through casts and copies alone: silu(gate) is not."""
    while isinstance(node, Node) and node.target in _ALIKE:
        node = node.args[0]
    return isinstance(node, Node) and node.target is aten.linear.default


def _rows(gm: GraphModule, node: Node, k: int) -> _Made | None:
    paths = [parameter_path(gm, operand) for operand in node.args[1:] if operand is not None]
    if not paths or None in paths or len(set(paths)) != len(paths):
        return None
    kinds: tuple[Literal["rows", "vector"], ...] = ("rows", "vector")
    made = tuple(Producer(path, kind) for path, kind in zip(paths, kinds, strict=False) if path)
    return made, k, None


def _attention(gm: GraphModule, node: Node, k: int) -> _Made | None:
    """reshape(transpose(attention(q, k, v))) back to the rows of the linear that makes v."""
    attended = _through(node, (*_RESHAPES, aten.transpose.int, *_ALIKE))
    if attended is None or attended.target is not aten.scaled_dot_product_attention.default:
        return None
    value = attended.args[2]
    if not isinstance(value, Node):
        return None
    width = int(attended.meta["val"].shape[-1])
    steps = (*_RESHAPES, aten.unflatten.int, aten.transpose.int, aten.expand.default, aten.unsqueeze.default)
    more = (aten.slice.Tensor, aten.repeat_interleave.self_int, *_ALIKE)
    source = value if value.target is aten.linear.default else _through(value, (*steps, *more), first=True)
    if source is None or source.target is not aten.linear.default or len(source.users) != 1:
        return None
    rows = int(source.meta["val"].shape[-1])
    made = _rows(gm, source, rows)
    if made is None or rows % width or k % rows:
        return None
    share = k // rows  # heads of queries for one head of values
    index = tuple((c // width // share) * width + c % width for c in range(k))
    return made[0], rows, None if share == 1 else index


def _through(node: Node, targets: Sequence[object], first: bool = False) -> Node | None:
    """The first node before `node` that is none of these; None if one on the way has another user."""
    while node.op == "call_function" and node.target in targets:
        before = node.args[0]
        if not isinstance(before, Node) or len(before.users) != 1:
            return None
        node = before
    return node
