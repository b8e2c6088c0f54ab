"""A model folded by a recipe, its graph as lines, and the same in each of the three scopes."""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bitfold.passes import (
    Annotate,
    Pipeline,
    Recipe,
    Rule,
    capture,
    capture_frame,
    find_pass,
    snapshot,
)


def everything(weight: str, **options: str) -> Recipe:
    return Recipe("everything", (Rule(op="*", weight=weight, **options),))


def folded(model: nn.Module, inputs: Tensor, recipe: str | Recipe, dynamic: str | None = None) -> GraphModule:
    gm = capture(model, (inputs,), dynamic=dynamic)
    Pipeline([Annotate(recipe), find_pass("fold")()]).run(gm)
    return gm


def text(gm: GraphModule) -> list[str]:
    return str(snapshot(gm)).splitlines()


def constants(gm: GraphModule, prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{name}": held for name, held in gm.named_buffers() if "_codes" in name or "_scales" in name
    }


def in_program(model: nn.Module, x: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], Tensor]:
    gm = folded(model, x, recipe)
    return constants(gm), gm(x)


def in_frame(model: nn.Module, x: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, Tensor] = {}

    def backend(gm: GraphModule, inputs: list[Tensor]) -> GraphModule:
        captured = capture_frame(gm, inputs)
        Pipeline([Annotate(recipe), find_pass("fold")()]).run(captured)
        found.update(constants(captured))
        return captured

    with torch.no_grad():
        return found, torch.compile(model, backend=backend, fullgraph=True)(x)
