"""A model that is folded already, and a recipe: may it be given again?

In: a model and a recipe. Out: what the recipe's rules see of the layers that hold codes already, or one
sentence about a layer whose codes the recipe wants otherwise: from codes there is no way to other codes but a
second rounding, which nobody asked for.

    quantize(model, "int8"); quantize(model, "int8")  ->  nothing is left to do
    quantize(model, "int8"); quantize(model, "int4")  ->  layer fc holds int8 and the recipe wants int4[g128]
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from ..formats import BitfoldError
from ..passes.recipes import Recipe, is_head
from ..passes.rules import STORED, Rule, Site
from .folded import Folded
from .folded_weight import FoldedWeight


def folded_sites(model: nn.Module, recipe: Recipe) -> Iterator[Site]:
    """Every folded weight as rules see it. Raises BitfoldError if `recipe` wants one in another format."""
    folded = [(path, module) for path, module in model.named_modules() if isinstance(module, Folded)]
    tables = {
        id(getattr(module, weight.parts[0]))
        for path, module in folded
        for weight in module.folded_weights
        if _op(path, module) == "embedding"
    }
    for path, module in folded:
        for weight in module.folded_weights:
            op = _op(path, module)
            tied = op == "linear" and id(getattr(module, weight.parts[0])) in tables
            numel = math.prod(weight.shape)
            names = (path, f"{path}.{weight.name}".strip("."))
            site = Site(names, "head" if tied else op, n=numel // max(weight.k, 1), k=weight.k, numel=numel)
            rule = recipe.rule(site)
            if rule is not None and not rule.skip:
                _check(path, module, weight, rule, site.op)
            yield site


def _check(path: str, module: Folded, weight: FoldedWeight, rule: Rule, op: str) -> None:
    given = _activations(module)
    wanted = {text for text in (rule.input if op != "embedding" else "", rule.output) if text}
    same = rule.weight in ("", STORED, weight.canonical) and wanted == given
    if not same:
        holds = ", ".join([weight.canonical, *(f"{text} activations" for text in sorted(given))])
        raise BitfoldError(
            f"layer {path or '(the model)'} is quantized already ({holds}) and the recipe wants otherwise "
            f"({rule}); quantize the model as it was before, or skip the layer by a rule"
        )


def _activations(module: Folded) -> set[str]:
    """The formats that activations of the module take."""
    nodes = module.canonical.graph["nodes"]
    return {node["args"][1] for node in nodes if node.get("target") == "bitfold.quantize.default"}


def _op(path: str, module: Folded) -> str:
    """The op kind, by what the folded graph calls."""
    targets = {str(node.get("target")) for node in module.canonical.graph["nodes"]}
    if "aten.embedding.default" in targets:
        return "embedding"
    if targets & {"aten.conv1d.default", "aten.conv2d.default", "aten.convolution.default"}:
        return "conv"
    return "head" if is_head(path) else "linear"
