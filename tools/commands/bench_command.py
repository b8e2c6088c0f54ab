"""Time a model under recipes, compiled with torch.compile: "none" is the model as it is.

A language model decodes with a static cache at each batch size; another model is called on its inputs.

  bitfold bench --recipe none --recipe int8_all --batch 1
  bitfold bench mine.py:build --recipe none --recipe 'int4[g64]'
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from ...lowering import quantize
from ...passes.recipes import Recipe
from ..demo import table
from ..measure import pick_device, time_calls, weight_bytes
from ..models import Loaded
from ..smollm2 import SmolLM2
from ..text import pydoc_tokens
from ..trial import Bench, shared_copy
from .shared import add_model, plain, positive, read_model, read_recipe, size, waiting

ABOUT = "time a model under recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--recipe",
        action="append",
        required=True,
        help="may be repeated; the first is the baseline",
    )
    parser.add_argument(
        "--batch", type=positive, action="append", help="batch size to decode at (default: 1)"
    )
    parser.add_argument("--steps", type=positive, default=32, help="tokens to decode, or calls (default: 32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a CUDA GPU if there is one")


def run(arguments: argparse.Namespace, console: Console) -> None:
    for recipe in arguments.recipe:
        read_recipe(recipe)
    device = pick_device(arguments.device)
    loaded = read_model(arguments.model, console)
    if loaded.tokenizer is None:
        console.print(_calls(loaded, arguments.recipe, device, arguments.steps, console))
        return
    found = SmolLM2(loaded.model, loaded.tokenizer, dict(loaded.stored))
    bench = Bench.of(found, pydoc_tokens(loaded.tokenizer), device)
    batches = arguments.batch or [1]
    trials = []
    for recipe in arguments.recipe:
        with waiting(console, recipe) as progress:
            trials.append(bench.trial(recipe, batches=batches, steps=arguments.steps, progress=progress))
    console.print(table(trials, batches))


def _calls(
    loaded: Loaded, recipes: Sequence[str], device: torch.device, calls: int, console: Console
) -> Table:
    """For a model that is no language model: the time of a compiled call."""
    inputs = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in loaded.example())
    base = loaded.model.to(device)
    out = Table(box=None, pad_edge=False)
    for head in ("recipe", "weights", "ms a call", "compile"):
        out.add_column(head, justify="left" if head == "recipe" else "right")
    for recipe in recipes:
        model = shared_copy(base)
        with waiting(console, recipe) as progress:
            if Recipe.parse(recipe).rules:
                model = quantize(
                    model, recipe, stored=loaded.stored, example_inputs=inputs, progress=progress
                )
            seconds = time_calls(model, inputs, calls=calls)
        out.add_row(
            plain(recipe),
            size(weight_bytes(model)),
            f"{1e3 * seconds.step_seconds:.3f}",
            f"{seconds.compile_seconds:.1f} s",
        )
    return out
