"""The page of one recipe on a whole language model: captured as one program, put through the passes, lowered,
timed, drawn by viz.

In: a causal language model, a recipe, a few tokens. Out: an HTML file with each stage's graph, errors against
the unquantized model, times and kernels.

    write_page(model, "int8_all", tokens, "page.html")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from ..formats import Quantized
from ..lowering import Pipeline, default_target
from ..lowering.lower import Lower
from ..passes import capture
from ..passes.annotate import Annotate
from ..passes.fold import Fold
from ..passes.fuse import Fuse
from .inspection import inspect
from .viz import viz


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
    device = next(model.parameters()).device
    found = inspect(
        Logits(model),
        Pipeline([Annotate(recipe=recipe), Fold(), Fuse(), Lower(target=default_target(device))]),
        (tokens.to(device),),
        dynamic="batch+sequence",
        stored={f"model.{path}": codes for path, codes in (stored or {}).items()},
        runs=3,
        progress=report,
    )
    report("writing the page")
    return viz(found, path, title=title)


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


def _silent(what: str) -> None:
    del what
