"""Keys and values rounded in training as a KV cache will round them, and the cache in codes afterwards.

In: a graph that trains, and a recipe with rules of op `cache` (`kv_int8`, say). Out: a `train_quantize` on
what is written to each cache that a rule means, or, in a graph without caches (the usual one to train), on
the keys and values of each attention.

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

from ...formats import Format, format
from ...formats.gradient import Gradient
from ...passes import Miss, Pass, Stage, report, state
from ...passes.edges import EDGE, Edge, edge
from ...passes.provenance import inherit, origin
from ...passes.recipes import Recipe
from ...passes.rules import CACHE, Rule
from ...passes.rules import Site as RuleSite
from ...passes.training.quantizers import TRAIN_QUANTIZE, clock
from ..kv_cache.quantize import QuantizeCache
from ..kv_cache.sites import ATTENTION, Site, sites, unrepeated
from .trained_as import CACHED


def has_attention(gm: GraphModule) -> bool:
    """Whether there are keys and values."""
    return bool(gm.graph.find_nodes(op="call_function", target=ATTENTION))


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
        for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
            site, paths = held.get(node, (None, None))
            if isinstance(site, Miss):
                report(gm, node, site, asked=f"cache {paths[0] if paths else ''}")
                continue
            made += self._attention(gm, node, site, paths)
        state(gm).mutated = None
        return made

    def _attention(
        self, gm: GraphModule, node: Node, site: Site | None, paths: tuple[str, str] | None
    ) -> int:
        layer = origin(node).module_path
        values = [unrepeated(node.args[i])[0] for i in (1, 2)]
        if site is not None:
            values = [site.k.write.value, site.v.write.value]
        rules = [
            self._rule(value, (layer, layer) if paths is None else paths, i) for i, value in enumerate(values)
        ]
        chosen = [rule for rule in rules if rule is not None]
        skip = next((rule.skip for rule in chosen if rule.skip), "")
        if skip:
            report(gm, node, Miss(skip), asked=f"cache {layer}")
            return 0
        made = 0
        for which, value, rule in zip("kv", values, rules, strict=True):
            if rule is None:
                continue
            fmt = format(rule.weight)
            if fmt.scale is not None and fmt.scale.granularity.rows != 1:
                report(
                    gm, node, Miss(f"{fmt} has no scale of its own for each token"), asked=f"cache {layer}"
                )
                continue
            kind = CACHED if site is not None else "input"
            made += self._round(gm, value, Edge(f"{layer}.{which}", kind, rule.weight), fmt, node)
        return made

    def _rule(self, value: Node, paths: tuple[str, str], index: int) -> Rule | None:
        shape, path = value.meta["val"].shape, paths[index]
        tokens = shape[-2] if isinstance(shape[-2], int) else 0
        owner = path.rpartition(".")[0]
        count = tokens * int(shape[-1])
        return Recipe.parse(self.recipe).rule(RuleSite((path, owner), CACHE, tokens, int(shape[-1]), count))

    def _round(self, gm: GraphModule, value: Node, on: Edge, fmt: Format, attention: Node) -> int:
        gradient = self.gradient if not self.gradient.learns else Gradient("straight")
        counts = clock(gm, value.meta["val"].device) if self.warmup else None
        args: Any = (value, on.format, str(gradient), [], False, counts, self.warmup)
        with gm.graph.inserting_after(value):
            new = gm.graph.create_node(
                "call_function", TRAIN_QUANTIZE, args, name=f"{value.name}_{on.which}_rounded"
            )
        new.meta["val"], new.meta[EDGE] = value.meta["val"], on
        inherit(new, [attention])
        value.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return 1


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
