"""The pass `lower`: a fused graph -> regions on a target's operators, weights in the target's layout.

In: a graph at stage `fused`. Out: each region rewritten by the first target that takes it; each weight
repacked into that target's layout, one by one, its canonical copy released. What no target takes stays as
reference operators, with a warning and an entry in the report.

    lower{target=cpu}:   fused_fc(x, packed codes): linear(x, dequantize(..))
                     ->  fused_fc(x, planar codes): cpu_linear(x, [codes, scales], ..)
    lower{target="mine,cpu"}:   mine where it takes a region, cpu elsewhere
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..formats import Format, Layout, Quantized, format
from ..passes import Pass, Stage, register_pass, report, state
from ..passes.edit import fake_mode
from ..passes.fuse import region_of
from ..passes.stages import find_attribute
from .partition import Partition, partition
from .target import Target, get_target

DEQUANTIZE = torch.ops.bitfold.dequantize.default
TAKEN_BY = "bitfold_target"
"""In the `meta` of a region's call: the name of the target that took it."""


@register_pass
@dataclass(frozen=True)
class Lower(Pass):
    """target: one name, or several in order of preference with commas between them."""

    name: ClassVar[str] = "lower"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.fused,)
    produces: ClassVar[Stage | None] = Stage.lowered

    target: str = "cpu"

    def apply(self, gm: GraphModule) -> int:
        """Number of regions that a target took."""
        targets = [get_target(name.strip()) for name in self.target.split(",")]
        found = partition(gm, targets)
        _tell(gm, found, targets)
        constants = _constants(gm)
        for weight in _weights(gm, found):
            _lay_out(gm, weight, constants)
        for call, target in found.taken.items():
            region = region_of(gm, call)
            assert region is not None
            _put(gm, call, region, target.lower(region))
            call.meta[TAKEN_BY] = target.name
        return len(found.taken)


def _put(gm: GraphModule, call: Node, region: GraphModule, lowered: GraphModule) -> None:
    if lowered is region:
        return
    lowered.meta.update(region.meta)
    owner, _, name = str(call.target).rpartition(".")
    setattr(gm.get_submodule(owner), name, lowered)


def _tell(gm: GraphModule, found: Partition, targets: Sequence[Target]) -> None:
    names = ",".join(target.name for target in targets)
    for call, miss in found.left.items():
        report(gm, call, miss, asked=f"target {names}")
    if found.left:
        first, why = next(iter(found.left.items()))
        warnings.warn(
            f"{len(found.left)} of {len(found.left) + len(found.taken)} regions stay on reference operators, "
            f"{first.name} because of {why.reason}",
            stacklevel=2,
        )


@dataclass(frozen=True)
class _Weight:
    """A folded weight: its parts by attribute, its format, and every `dequantize` that reads it."""

    attributes: tuple[str, ...]
    format: Format
    k: int
    readers: tuple[Node, ...]
    layout: Layout


def _weights(gm: GraphModule, found: Partition) -> Iterator[_Weight]:
    """Weights that a taken region reads, with the layout that the first such target wants."""
    readers: dict[tuple[str, ...], list[Node]] = {}
    wanted: dict[tuple[str, ...], Target] = {}
    for call, node, parts in _reads(gm):
        # The first reader is one in a region that is taken, if there is any: it says which layout.
        first = call in found.taken and parts not in wanted
        readers.setdefault(parts, []).insert(0 if first else len(readers.get(parts, [])), node)
        if call in found.taken:
            wanted.setdefault(parts, found.taken[call])
    for parts, target in wanted.items():
        nodes = readers[parts]
        _, text, k, _ = nodes[0].args
        if isinstance(k, int):
            fmt = format(str(text))
            codes = Quantized.from_parts(fmt, [find_attribute(gm, name) for name in parts], k)
            layout = target.layout_for(nodes[0], fmt, k) if target.takes(codes) else fmt.layout
            yield _Weight(parts, fmt, k, tuple(nodes), layout)


def _reads(gm: GraphModule) -> Iterator[tuple[Node, Node, tuple[str, ...]]]:
    """(node of the graph, dequantize in it or in its region, attributes of the constant parts it reads)."""
    for node in gm.graph.nodes:
        region = region_of(gm, node)
        if region is None:
            inside = [node] if node.target is DEQUANTIZE else []
            outer: dict[Node, Node] = {}
        else:
            inside = region.graph.find_nodes(op="call_function", target=DEQUANTIZE)
            outer = dict(zip(region.graph.find_nodes(op="placeholder"), node.args, strict=True))
        for read in inside:
            sources = [outer.get(part, part) for part in read.args[0]]
            if all(source.op == "get_attr" for source in sources):
                yield node, read, tuple(str(source.target) for source in sources)


def _constants(gm: GraphModule) -> dict[str, list[Node]]:
    """The nodes that read each attribute."""
    found: dict[str, list[Node]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        found.setdefault(str(node.target), []).append(node)
    return found


def _lay_out(gm: GraphModule, weight: _Weight, constants: Mapping[str, list[Node]]) -> None:
    """Repack one weight and tell its readers; the canonical codes are released with the attribute."""
    if weight.layout == weight.format.layout:
        return
    parts = [find_attribute(gm, name) for name in weight.attributes]
    laid = Quantized.from_parts(weight.format, parts, weight.k)
    store = state(gm).store
    relaid = getattr(store, "relaid", None)
    new = relaid(laid, weight.layout) if relaid else weight.format.relayout(laid, weight.layout)
    text = str(weight.format.with_layout(weight.layout))
    for name, tensor in zip(weight.attributes, new.parts, strict=True):
        _set_constant(gm, name, tensor, constants[name])
    for reader in weight.readers:
        reader.args = (reader.args[0], text, *reader.args[2:])


def _set_constant(gm: GraphModule, name: str, tensor: Tensor, nodes: Sequence[Node]) -> None:
    old = find_attribute(gm, name)
    if tensor is old:
        return
    owner, _, leaf = name.rpartition(".")
    setattr(gm.get_submodule(owner), leaf, tensor)
    with fake_mode(gm):
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    for node in nodes:
        node.meta["val"] = fake
        for user in node.users:
            _set_inside(gm, user, node, fake)


def _set_inside(gm: GraphModule, call: Node, constant: Node, fake: Tensor) -> None:
    region = region_of(gm, call)
    if region is None:
        return
    for inner, given in zip(region.graph.find_nodes(op="placeholder"), call.args, strict=True):
        if given is constant:
            inner.meta["val"] = fake
