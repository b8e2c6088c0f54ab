"""What `explain`, `viz` and `plot` have in common: which passes to look at, on which model, in which dtype.

In: an argparse parser, or its result. Out: the options on the parser; an `Inspection`.

    add_looking(parser);  look_at(read_model(...), pipelines(arguments)[0], arguments, console)
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ...formats import BitfoldError
from ...lowering import Pipeline, default_target
from ...lowering.lower import Lower
from ...passes import Recipe
from ...passes.annotate import Annotate
from ...passes.fold import Fold
from ...passes.fuse import Fuse
from ..inspection import Inspection, inspect
from ..models import Loaded
from ..on_paper import OnPaper
from ..page import Logits
from .shared import add_model, read_recipe

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def add_looking(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """MODEL, --recipe or --pipeline (repeated if `several`), --target, --dtype, --runs."""
    add_model(parser)
    parser.add_argument(
        "--recipe",
        action="append",
        default=[],
        help="a recipe's name, a format such as int4[g64], or a JSON file" + (" (may be repeated)" * several),
    )
    parser.add_argument(
        "--pipeline",
        action="append",
        default=[],
        metavar="TEXT",
        help="in a recipe's place: passes in order, 'annotate{recipe=int4},fold,fuse,lower{target=cpu}'",
    )
    parser.add_argument(
        "--target",
        help="who runs it: cpu, cuda, reference, ... (by default the model's device); cuda_on_paper shows "
        "a GPU's kernels without one",
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="cast the model first; GPU kernels want bf16 or f16"
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="timed calls; 0 times nothing")


def pipelines(arguments: argparse.Namespace, loaded: Loaded) -> list[Pipeline]:
    """Those asked for, in the order of recipes and then of texts. BitfoldError if there is none."""
    if not arguments.recipe and not arguments.pipeline:
        raise BitfoldError("say what to do to the model: --recipe RECIPE or --pipeline TEXT")
    device = next((p.device for p in loaded.model.parameters()), torch.device("cpu"))
    target = arguments.target or default_target(device)
    given = [of_recipe(read_recipe(text), target) for text in arguments.recipe]
    return given + [Pipeline.parse(text) for text in arguments.pipeline]


def of_recipe(recipe: Recipe, target: str) -> Pipeline:
    """annotate, fold, fuse, lower."""
    return Pipeline([Annotate(recipe=str(recipe)), Fold(), Fuse(), Lower(target=target)])


def prepared(loaded: Loaded, arguments: argparse.Namespace) -> Loaded:
    """The model in the dtype asked for."""
    if arguments.runs < 0:
        raise BitfoldError(f"--runs is a number of calls, not {arguments.runs}")
    if arguments.target == OnPaper.name and arguments.dtype in (None, "f32"):
        raise BitfoldError("a GPU's kernels take bfloat16 or float16: add --dtype bf16")
    if arguments.dtype is None:
        return loaded
    dtype = DTYPES[arguments.dtype]
    # Codes that came with the model are of float32 weights, and stay.
    return replace(
        loaded, model=loaded.model.to(dtype), inputs=tuple(_cast(one, dtype) for one in loaded.inputs)
    )


def look_at(
    loaded: Loaded, pipeline: Pipeline, arguments: argparse.Namespace, console: Console
) -> Inspection:
    """Run the pipeline on the model, with a spinner that says what is being done."""
    language = loaded.tokenizer is not None
    model = Logits(loaded.model) if language else loaded.model
    prefix = "model." if language else ""
    with console.status("") as status:
        return inspect(
            model,
            pipeline,
            loaded.example(),
            dynamic="batch+sequence" if language else None,
            stored={prefix + path: codes for path, codes in loaded.stored.items()},
            runs=arguments.runs,
            progress=lambda what: status.update(what),
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
