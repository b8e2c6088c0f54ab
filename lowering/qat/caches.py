"""Keys and values rounded in training as a KV cache will round them, and the cache in codes afterwards.

In: a graph that trains, and a recipe with rules of op `cache` (`kv_int8`, say). Out: a `train_quantize` on
what is written to each cache that a rule means, or, in a graph without caches (the usual one to train), on
the keys and values of each attention. Whoever else reads those numbers reads them as they are.

    index_put_(%cache, .., %k)   ->   index_put_(%cache, .., train_quantize(%k, "int8[bf16]", "clip", ..))
    sdpa(%q, %k, %v)             ->   sdpa(%q, train_quantize(%k, ..), train_quantize(%v, ..))

A scale is one token's and head's, chosen from its numbers, so that there is nothing to learn. `settle_cache`
takes the rounding off what is written to a cache and puts the cache itself in codes by `quantize_cache`,
whose write rounds in the same way; an attention without a cache keeps its rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from ...formats import format
from ...formats.gradient import Gradient
from ...passes import Miss, Pass, Stage, register_pass, report, state
from ...passes.edges import EDGE, Edge, edge
from ...passes.provenance import inherit, origin
from ...passes.recipes import Recipe
from ...passes.rules import CACHE, Rule
from ...passes.rules import Site as RuleSite
from ...passes.training.quantizers import TRAIN_QUANTIZE, clock
from ..kv_cache.quantize import QuantizeCache
from ..kv_cache.sites import ATTENTION, Site, Write, sites, unrepeated
from .trained_as import CACHED


def has_attention(gm: GraphModule) -> bool:
    """Whether there are keys and values."""
    return bool(gm.graph.find_nodes(op="call_function", target=ATTENTION))


@register_pass
@dataclass(frozen=True)
class TrainCache(Pass):
    """recipe: as `annotate` takes it, of which rules of op `cache` count; gradient: of the rounding; warmup:
    steps that train in floats."""

    name: ClassVar[str] = "train_cache"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = None
    produces: ClassVar[Stage | None] = Stage.fake_quantized

    recipe: str
    gradient: Gradient
    warmup: int = 0

    def apply(self, gm: GraphModule) -> int:
        """Number of keys and values that are rounded."""
        made = 0
        held = {node: (site, paths) for node, site, paths in sites(gm)}
        shared: dict[tuple[Node, str, str], Node] = {}
        for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
            site, paths = held.get(node, (None, None))
            if isinstance(site, Miss):
                report(gm, node, site, asked=f"cache {paths[0] if paths else ''}")
                continue
            made += self._attention(gm, node, site, paths, shared)
        state(gm).mutated = None
        return made

    def _attention(
        self,
        gm: GraphModule,
        node: Node,
        site: Site | None,
        paths: tuple[str, str] | None,
        shared: dict[tuple[Node, str, str], Node],
    ) -> int:
        layer = origin(node).module_path
        writes = None if site is None else (site.k.write, site.v.write)
        values: Any = node.args[1:3] if writes is None else [write.value for write in writes]
        rules = [
            self._rule(value, (layer, layer) if paths is None else paths, i) for i, value in enumerate(values)
        ]
        chosen = [rule for rule in rules if rule is not None]
        skip = next((rule.skip for rule in chosen if rule.skip), "")
        if skip:
            report(gm, node, Miss(skip), asked=f"cache {layer}")
            return 0
        alike = rules[0] is not None and rules[1] is not None and rules[0].weight == rules[1].weight
        # Found before anything is written, so that keys that are the values are found as they were.
        reads = [_reads(node, i, alike) if writes is None else _writes(writes[i - 1]) for i in (1, 2)]
        made = 0
        for which, read, rule in zip("kv", reads, rules, strict=True):
            if rule is None:
                continue
            fmt = format(rule.weight)
            if fmt.scale is not None and fmt.scale.granularity.rows != 1:
                report(
                    gm, node, Miss(f"{fmt} has no scale of its own for each token"), asked=f"cache {layer}"
                )
                continue
            on = Edge(f"{layer}.{which}", "input" if writes is None else CACHED, rule.weight)
            key = (read.value, on.which, on.format)
            if key not in shared:
                shared[key] = self._rounded(gm, read.value, on, node)
            for reader, place in read.places:
                reader.update_arg(place, shared[key])
            made += 1
        return made

    def _rule(self, value: Node, paths: tuple[str, str], index: int) -> Rule | None:
        shape, path = value.meta["val"].shape, paths[index]
        tokens = shape[-2] if isinstance(shape[-2], int) else 0
        owner = path.rpartition(".")[0]
        count = tokens * int(shape[-1])
        return Recipe.parse(self.recipe).rule(RuleSite((path, owner), CACHE, tokens, int(shape[-1]), count))

    def _rounded(self, gm: GraphModule, value: Node, on: Edge, attention: Node) -> Node:
        counts = clock(gm, value.meta["val"].device) if self.warmup else None
        args: Any = (value, on.format, str(self.gradient.without_scales()), [], False, counts, self.warmup)
        with gm.graph.inserting_after(value):
            new = gm.graph.create_node(
                "call_function", TRAIN_QUANTIZE, args, name=f"{value.name}_{on.which}_rounded"
            )
        new.meta["val"], new.meta[EDGE] = value.meta["val"], on
        return inherit(new, [attention])


@dataclass(frozen=True)
class _Read:
    """Keys or values, and who reads them as such: (node, which of its arguments) of each."""

    value: Node
    places: tuple[tuple[Node, int], ...]


def _reads(attention: Node, index: int, alike: bool) -> _Read:
    """An operand of an attention before its heads are repeated, or as it is if others read what lies between;
    alike: keys and values are rounded in one way, and may share it."""
    operand: Any = attention.args[index]
    base, _ = unrepeated(operand)
    own = (1, 2) if alike else (index,)
    at, reader = operand, attention
    while at is not base:
        places = [place for place, given in enumerate(reader.args) if given is at]
        told = set(own) if reader is attention else {0}
        if set(at.users) != {reader} or not told.issuperset(places):
            return _Read(operand, ((attention, index),))
        at, reader = at.args[0], at
    return _Read(at, ((reader, index if reader is attention else 0),))


def _writes(write: Write) -> _Read:
    pairs = ((node, place) for node in write.nodes for place, given in enumerate(node.args))
    return _Read(write.value, tuple((n, place) for n, place in pairs if n.args[place] is write.value))


@register_pass
@dataclass(frozen=True)
class SettleCache(Pass):
    """recipe: the same."""

    name: ClassVar[str] = "settle_cache"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.fake_quantized,)
    produces: ClassVar[Stage | None] = None

    recipe: str

    def apply(self, gm: GraphModule) -> int:
        """Number of caches in codes."""
        rounded = [
            node
            for node in gm.graph.find_nodes(op="call_function", target=TRAIN_QUANTIZE)
            if (on := edge(node)) is not None and on.which == CACHED
        ]
        for node in rounded:
            source: Any = node.args[0]
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
        state(gm).mutated = None
        return QuantizeCache(self.recipe).apply(gm) if rounded else 0
