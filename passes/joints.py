"""Joints: operators that take activations alone, whose operands can take formats too.

In: a captured graph of a whole model, a recipe whose rules name such kinds. Out: an `Operands` at
`node.meta["bitfold_operands"]` of each that a rule means; observers, fake quantization and folding then
treat its edges as they treat a linear's input.

    Rule(op="add", input="int8[tensor]", observer="minmax")
    %s = add(%a, %b)   ->   %s = add(%a, %b)   # both operands int8[tensor], observed by minmax

kind       operators                                                     operands
add, mul   aten.add, aten.mul of two activations                         both
pool       average, maximum and adaptive pooling, means over images      the image
softmax    aten.softmax                                                  what goes in
attention  scaled_dot_product_attention; a product of two activations    q, k and v; both (QK^T, and PV)

In an attention of one operator the probabilities stay inside it, as floats; spelled out, they are an operand
of the second product. What such an edge holds is defined by the graph, `dequantize(quantize(x))`; a target
may do better than compute that. Two cannot have it: a sum in place, where what it writes is seen elsewhere,
and a softmax of masked scores (`masks.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..formats import BitfoldError, Format, FormatError, format
from .constants import constant_nodes
from .core import Miss, report, state
from .masks import learned, mask_of
from .provenance import origin
from .recipes import Recipe
from .rules import JOINTS, Rule, Site
from .shared_memory import memory, sees_write

aten = torch.ops.aten
KEY = "bitfold_operands"

_IMAGES = frozenset(
    {
        *(aten.avg_pool2d.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default),
        *(aten.avg_pool1d.default, aten.max_pool1d.default, aten.adaptive_avg_pool1d.default),
        aten.adaptive_max_pool2d.default,
    }
)
TARGETS: dict[object, tuple[str, tuple[int, ...]]] = {
    aten.add.Tensor: ("add", (0, 1)),
    aten.add_.Tensor: ("add", (0, 1)),
    aten.mul.Tensor: ("mul", (0, 1)),
    **dict.fromkeys(_IMAGES, ("pool", (0,))),
    aten.mean.dim: ("pool", (0,)),
    aten.softmax.int: ("softmax", (0,)),
    aten._softmax.default: ("softmax", (0,)),
    aten.scaled_dot_product_attention.default: ("attention", (0, 1, 2)),
    aten.matmul.default: ("attention", (0, 1)),
    aten.bmm.default: ("attention", (0, 1)),
}
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


MODULE = (
    "an operator between modules is seen by the graph of the whole model alone; give it a format by "
    "scope='program'"
)
"""What is said where modules are quantized one by one."""


def speaks_of_joints(recipe: Recipe) -> bool:
    """Whether a rule is about operators that take activations alone."""
    return any(op in JOINTS for rule in recipe.rules for op in rule.op.split("|"))


@dataclass(frozen=True)
class Operands:
    """What a rule wants of one joint: the format of these arguments, and how their ranges are found."""

    layer: str
    kind: str
    rule: str
    places: tuple[int, ...]
    format: str
    observer: str = ""


def operands(node: Node) -> Operands | None:
    """What is wanted of `node`, if anything is."""
    found = node.meta.get(KEY)
    return found if isinstance(found, Operands) else None


def sites(gm: GraphModule) -> Iterator[tuple[Node, Site]]:
    """Every joint, as rules see it."""
    known = constant_nodes(gm)
    for node in gm.graph.nodes:
        kind = _kind(node, known)
        if kind is not None:
            layer = state(gm).path(origin(node).module_path) or node.name
            yield node, Site((layer, node.name), kind, 0, 0, 0)


def plan_joints(gm: GraphModule, recipe: Recipe) -> list[tuple[Node, Operands | Miss, Rule]]:
    """What the recipe wants of every joint, nothing written yet. Raises BitfoldError for one that cannot."""
    found: list[tuple[Node, Operands | Miss, Rule]] = []
    seen = _Seen(gm)
    for node, site in sites(gm):
        rule = recipe.rule(site)
        if rule is None or (not rule.input and not rule.skip):
            continue
        if rule.skip:
            found.append((node, Miss(rule.skip), rule))
            continue
        places = TARGETS[node.target][1]
        why = _misfit(node, places, format(rule.input), rule) or seen.misfit(node, format(rule.input))
        if why and rule.on_misfit == "error":
            raise BitfoldError(
                f"{site.op} {node.name} of {site.paths[0]}: {why} (on_misfit='report' leaves it as it is)"
            )
        wanted = Operands(site.paths[0], site.op, str(rule), places, rule.input, rule.observer)
        found.append((node, Miss(why) if why else wanted, rule))
    return found


def write_joints(gm: GraphModule, planned: list[tuple[Node, Operands | Miss, Rule]]) -> int:
    """Notes on the nodes; the number of them."""
    for node, wanted, rule in planned:
        if isinstance(wanted, Miss):
            report(gm, node, wanted, str(rule))
        else:
            node.meta[KEY] = wanted
    return sum(isinstance(wanted, Operands) for _, wanted, _ in planned)


def _kind(node: Node, known: set[Node]) -> str | None:
    """The kind of a joint: all of its operands are activations of floating point, none `known` ahead."""
    if node.op != "call_function" or node.target not in TARGETS:
        return None
    kind, places = TARGETS[node.target]
    for place in places:
        value = node.args[place] if len(node.args) > place else None
        if not isinstance(value, Node) or not isinstance(value.meta.get("val"), Tensor):
            return None
        if not value.meta["val"].dtype.is_floating_point or value.meta["val"].ndim == 0:
            return None
        if value in known:
            return None
    if node.target is aten.mean.dim and not _over_image(node):
        return None
    return kind


def _over_image(node: Node) -> bool:
    """A mean over the last two of four dimensions is a pooling; one over channels is part of a norm."""
    dims, ndim = node.args[1], node.args[0].meta["val"].ndim  # type: ignore[union-attr]
    return ndim == 4 and isinstance(dims, list | tuple) and {int(d) % 4 for d in dims} == {2, 3}  # type: ignore[arg-type]


@dataclass
class _Seen:
    """What is known of a whole graph, found out when it is first asked for."""

    gm: GraphModule

    @cached_property
    def memory(self) -> dict[Node, object]:
        return memory(self.gm.graph)

    @cached_property
    def scores(self) -> tuple[set[Node], set[Node]]:
        return learned(self.gm), constant_nodes(self.gm)

    def misfit(self, node: Node, fmt: Format) -> str:
        """Why this operator cannot take a format where it stands; "" if it can."""
        if node.target is aten.add_.Tensor and (other := sees_write(node, self.memory)):
            return (
                f"what it writes to is seen by {other.name} too, which does not see the rounded tensor; "
                "write x = x + y"
            )
        if TARGETS[node.target][0] == "softmax" and fmt.scale is not None:
            mask = mask_of(self.gm, node, *self.scores)
            if mask is not None:
                return f"its scores are masked by {mask.name}, and one scale for both leaves them nothing"
        return ""


def _misfit(node: Node, places: tuple[int, ...], fmt: Format, rule: Rule) -> str:
    """Why these operands cannot take the format; "" if they can."""
    scale = fmt.scale
    whole = scale is None or (scale.granularity.rows is None and scale.granularity.cols is None)
    if rule.weight or rule.output:
        return "it has no weight, and its result takes the format of what reads it; give its input alone"
    if rule.observer and not whole:
        return f"a calibrated input takes one scale a tensor, not {fmt}; write {fmt.element.name}[tensor]"
    if whole:
        return ""
    if TARGETS[node.target][0] == "pool":
        return f"an image takes one scale a tensor, not {fmt}; write {fmt.element.name}[tensor]"
    if node.target in _PRODUCTS:
        # The second operand is reduced over its rows, which have no common scale then.
        return f"a product of two activations takes one scale a tensor; write {fmt.element.name}[tensor]"
    for place in places:
        try:
            fmt.check((1, int(node.args[place].meta["val"].shape[-1])))  # type: ignore[union-attr]
        except FormatError as error:
            return str(error)
    return ""
