"""The pass `quantize_cache`: KV caches in codes, written by `cache_write` and read by `attend`.

In: a captured graph and a recipe with rules of op `cache`. Out: the same graph, each buffer of keys or values
that a rule means in codes and scales, made from what it holds, and its float numbers released.

    %p = index_put_(%k, [None, None, %pos], %new_k); %u = index_put_(%v, ..); %y = sdpa(%q, %p, %u, %mask)
    ->  cache_write([%k_codes, %k_scales, %v_codes, ..], %new_k, %new_v, %pos, None, "attention 32/8x128 ..")
        %y = attend(%q, [%k_codes, ..], %limits, %mask, None, "attention 32/8x128 ..")

limits, the tokens that each query sees, come from the mask on the device: of `arange(S) <= pos` they are
pos + 1, and nothing is left of the mask; of another mask the last token that it shows.

In the frame scope (torch.compile) buffers are the user's, so that caches are left and the reason is reported.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from ...codegen import CodegenError
from ...codegen.attention import TYPES, AttentionSpec, cache_format, grouped
from ...codegen.lanes import LANE_TYPES
from ...formats import BitfoldError, format, nearest
from ...passes import Miss, MissRecord, Pass, Stage, register_pass, report, state
from ...passes.constants import add_constant
from ...passes.edit import argument, call
from ...passes.recipes import Recipe
from ...passes.rules import CACHE, Rule
from ...passes.rules import Site as RuleSite
from .limits import COMPARED, Limits, mask_kind
from .sites import Held, Site, sites, unrepeated

aten = torch.ops.aten

FRAME = (
    "in torch.compile a buffer is the user's and stays as it is; quantize the cache ahead by "
    "bf.quantize(model, recipe, scope='program')"
)
MODULE = (
    "a KV cache is a buffer that a module's own code writes to, which only the graph of the whole model "
    "shows; put it in codes by scope='program'"
)
# What stands between a buffer and its attention, or makes a mask, and is gone when nothing reads it any more.
_DEAD = (
    aten.repeat_interleave.self_int, aten.reshape.default, aten.view.default, aten.flatten.using_ints,
    aten.expand.default, aten.unsqueeze.default, aten.contiguous.default, aten.clone.default,
    aten.alias.default, *COMPARED, aten.arange.default, aten.arange.start,
)  # fmt: skip


@register_pass
@dataclass(frozen=True)
class QuantizeCache(Pass):
    """recipe: as `annotate` takes it; only its rules of op `cache` are looked at."""

    name: ClassVar[str] = "quantize_cache"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.captured, Stage.annotated)

    recipe: str = "kv_int8"

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", str(Recipe.parse(self.recipe)))

    def apply(self, gm: GraphModule) -> int:
        """Number of caches in codes. Raises BitfoldError, before writing, if one cannot comply."""
        recipe = Recipe.parse(self.recipe)
        plans = []
        for node, site, paths in list(sites(gm)):
            plan = _plan(gm, recipe, node, site, paths)
            if isinstance(plan, _Plan):
                plans.append(plan)
            elif isinstance(plan, Miss):
                report(gm, node, plan, asked=f"cache {paths[0]}")
                if state(gm).scope == "frame":
                    warnings.warn(plan.reason, stacklevel=2)
        _report_unmatched(gm, recipe)
        work = _Rewrite(gm, Limits(gm))
        for plan in plans:
            work.put(plan)
        if plans:
            # Constants were told from caches when the graph had none of these writes.
            state(gm).mutated = None
        return len(plans)


def _report_unmatched(gm: GraphModule, recipe: Recipe) -> None:
    """Rules that name a cache which the graph does not have."""
    known = [path for _, _, paths in sites(gm) for path in paths]
    found = [RuleSite((path, path.rpartition(".")[0]), CACHE, 0, 0, 0) for path in known]
    for rule in recipe.rules:
        named = CACHE in rule.op.split("|") and rule.match != "*"
        if named and not any(rule.names(site) for site in found):
            hint = nearest(rule.match, known)
            reason = f"no cache matches this rule{hint}"
            state(gm).misses.append(MissRecord("", "", "", str(rule), reason))


def speaks_of_caches(recipe: Recipe) -> bool:
    """Whether a rule is about caches."""
    return any(CACHE in rule.op.split("|") for rule in recipe.rules)


@dataclass(frozen=True)
class _Plan:
    """What becomes of an attention."""

    site: Site
    spec: AttentionSpec


def _plan(
    gm: GraphModule, recipe: Recipe, node: Node, site: Site | Miss, paths: tuple[str, str]
) -> _Plan | Miss | None:
    """What a recipe wants of a cache; None if nothing."""
    shapes = [unrepeated(node.args[i])[0].meta["val"].shape for i in (1, 2)]
    rules: list[Rule | None] = []
    for path, shape in zip(paths, shapes, strict=True):
        count = 1
        for size in shape:
            count *= int(size)
        owner = path.rpartition(".")[0]
        rules.append(recipe.rule(RuleSite((path, owner), CACHE, int(shape[-2]), int(shape[-1]), count)))
    k, v = rules
    skip = next((rule.skip for rule in rules if rule is not None and rule.skip), "")
    if skip:
        return Miss(skip)
    if k is None and v is None:
        return None
    found = _spec(gm, node, site, k, v)
    if isinstance(found, AttentionSpec):
        assert isinstance(site, Site)
        return _Plan(site, found)
    strict = any(rule is not None and rule.on_misfit == "error" for rule in rules)
    if strict and state(gm).scope != "frame":
        raise BitfoldError(f"the cache {paths[0]}, {paths[1]}: {found.reason}")
    return found


def _spec(
    gm: GraphModule, node: Node, site: Site | Miss, k: Rule | None, v: Rule | None
) -> AttentionSpec | Miss:
    if state(gm).scope == "frame":
        return Miss(FRAME)
    if isinstance(site, Miss):
        return site
    if k is None or v is None or not (k.weight and v.weight):
        return Miss("keys and values both need a rule with a format as its weight")
    q: Any = node.args[0]
    value = q.meta["val"]
    heads, kv_heads, dim = value.shape[1], site.k.tensor.shape[1], site.k.tensor.shape[3]
    known = TYPES if value.device.type == "cpu" else LANE_TYPES
    lane = next((name for name, dtype in known.items() if dtype == value.dtype), None)
    if lane is None or site.k.tensor.dtype != value.dtype or site.v.tensor.dtype != value.dtype:
        return Miss(
            "a cache in codes serves bfloat16 and float16, in main memory float32 too, and this attention is "
            f"in {value.dtype}"
        )
    if argument(node, "dropout_p", 0.0):
        return Miss("its attention has dropout")
    scale = argument(node, "scale")
    if isinstance(scale, Node):
        return Miss("the scale of its attention is computed")
    if site.k.tensor.shape != site.v.tensor.shape or site.k.tensor.shape[0] != value.shape[0]:
        return Miss("keys, values and queries are not of one batch and size")
    mask = mask_kind(node, int(site.k.tensor.shape[2]))
    if isinstance(mask, Miss):
        return mask
    formats = [format(rule.weight) for rule in (k, v)]
    static = next((fmt for fmt in formats if fmt.scale is not None and not grouped(fmt)), None)
    if static is not None:
        return Miss(f"{static} has one scale for all tokens, which data would have to tell; take one a token")
    try:
        laid = [cache_format(fmt, int(dim)) for fmt in formats]
        return AttentionSpec(int(heads), int(kv_heads), int(dim), lane, laid[0], laid[1], mask, 0, scale)
    except CodegenError as error:
        return Miss(str(error))


@dataclass
class _Rewrite:
    """Puts plans into effect."""

    gm: GraphModule
    limits: Limits

    def put(self, plan: _Plan) -> None:
        gm, site, node, text = self.gm, plan.site, plan.site.attention, str(plan.spec)
        held = [(site.k, plan.spec.k), (site.v, plan.spec.v)]
        parts: list[Node] = []
        for buffer, fmt in held:
            made = fmt.quantize(buffer.tensor.detach())
            target = str(buffer.sources[0].target)
            for name, tensor in zip(fmt.parts, made.parts, strict=True):
                parts.append(add_constant(gm, f"{target}_{name}", tensor.contiguous(), buffer.sources[0]))
        first = site.k.write
        positions = self._positions(node, first.positions)
        call(
            gm, torch.ops.bitfold.cache_write.default,
            (parts, first.value, site.v.write.value, positions, None, text),
            before=node, origin_from=[node, *first.nodes, *site.v.write.nodes],
        )  # fmt: skip
        mask = self.limits.mask(node) if plan.spec.mask != "none" else None
        limits = self.limits.of(node, plan.spec.mask, int(site.k.tensor.shape[2]))
        y = call(
            gm, torch.ops.bitfold.attend.default,
            (node.args[0], parts, limits, mask, None, text), before=node, origin_from=[node],
        )  # fmt: skip
        node.replace_all_uses_with(y)
        self._erase(node, [site.k, site.v])

    def _new(self, before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        return call(self.gm, target, args, kwargs, before=before, origin_from=before)

    def _positions(self, node: Node, positions: Node | tuple[int, int]) -> Node:
        if isinstance(positions, Node):
            return self._new(node, aten.unsqueeze.default, positions, 0)
        at = self._new(node, aten.arange.start, *positions, device=node.meta["val"].device)
        return self._new(node, aten.unsqueeze.default, at, 0)

    def _erase(self, node: Node, held: list[Held]) -> None:
        """Removes the attention, what led to it, the writes and the buffers."""
        writes = [made for buffer in held for made in buffer.write.nodes]
        sources = [source for buffer in held for source in buffer.sources]
        gone: set[Node] = set()
        waiting = [*sources, *writes, node]
        while waiting:
            current = waiting.pop()
            dead = current is node or current in writes or current in sources or current.target in _DEAD
            if current in gone or current.users or not dead:
                continue
            # What it read may be dead now, and so may what waits for it.
            waiting += [*sources, *writes, *current.all_input_nodes]
            self.gm.graph.erase_node(current)
            gone.add(current)
        assert gone.issuperset(sources), "the buffer is read by what the search for caches did not see"
        for buffer in held:
            owner, _, leaf = str(buffer.sources[0].target).rpartition(".")
            delattr(self.gm.get_submodule(owner), leaf)
