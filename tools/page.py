"""The page of one recipe on a whole model: captured as one program, put through the passes, drawn by viz.

In: a causal language model, a recipe, a few tokens. Out: an HTML file with each stage's graph and the error
that each value has against the unquantized model.

    write_page(model, "int8_all", tokens, "page.html")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..formats import Quantized
from ..lowering import Pipeline
from ..lowering.parameters import with_all_names
from ..passes import Trace, capture, state
from ..passes.annotate import Annotate
from ..passes.fold import Fold
from ..passes.fuse import Fuse
from .lowered import twin
from .viz import node_errors, viz


def write_page(
    model: nn.Module,
    recipe: str,
    tokens: Tensor,
    path: str | Path,
    *,
    stored: Mapping[str, Quantized] | None = None,
    title: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """`progress` is called with what is being done. The model is left as it was."""
    report = progress or _silent
    tokens = tokens.to(next(model.parameters()).device)
    with torch.no_grad():
        report("capture")
        gm = captured(model, tokens)
        reference = twin(gm)
        report("passes")
        trace = run_passes(gm, recipe, model, stored or {})
        report("errors")
        errors = node_errors(reference, gm, (tokens,))
    report("write")
    return viz(trace, path, errors=errors, title=title)


class Logits(nn.Module):
    """A causal language model as a function from tokens [batch, length] to logits, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]


def captured(model: nn.Module, tokens: Tensor) -> GraphModule:
    """The program-scope graph, for any batch and length."""
    return capture(Logits(model), (tokens,), dynamic="batch+sequence")


def run_passes(gm: GraphModule, recipe: str, model: nn.Module, stored: Mapping[str, Quantized]) -> Trace:
    """annotate, fold, fuse."""
    whole = Logits(model)
    named = {f"model.{path}": codes for path, codes in stored.items()}
    state(gm).stored = with_all_names(named, whole)
    return Pipeline([Annotate(recipe=recipe), Fold(), Fuse()]).run(gm)


def _silent(what: str) -> None:
    del what
