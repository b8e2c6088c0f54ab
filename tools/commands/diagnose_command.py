"""Which layers lose the quality: each quantized layer held against the float model, the worst first.

bitfold diagnose --recipe 'int4[g64]'
bitfold diagnose mine.py:build --recipe int8_dynamic --worst 5
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from ...lowering import quantize
from ...lowering.diagnose import NO_NUMBER, decibel, diagnose
from ..models import Loaded
from ..trial import shared_copy
from .shared import add_model, add_recipe, plain, positive, read_model, read_recipe, say, waiting

ABOUT = "which layers lose the quality"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_recipe(parser)
    parser.add_argument(
        "--worst", type=positive, default=10, metavar="N", help="how many layers to show (default: 10)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out what each layer alone does to the output"
    )


def run(arguments: argparse.Namespace, console: Console) -> None:
    recipe = read_recipe(arguments.recipe)
    loaded = read_model(arguments.model, console)
    batches = _batches(loaded)
    with waiting(console, "quantizing") as progress:
        # A copy with modules of its own over the same weights: quantizing lets go of weights, and writes to
        # none.
        quantized = quantize(shared_copy(loaded.model), recipe, stored=loaded.stored, progress=progress)
    with waiting(console, "comparing") as progress:
        found = diagnose(loaded.model, quantized, batches, alone=not arguments.quick, progress=progress)
    table = Table()
    for head in ("layer", "format", "isolated", "cumulative", "alone"):
        table.add_column(head, justify="left" if head in ("layer", "format") else "right")
    for one in found.worst(arguments.worst):
        ratios = (decibel(one.cumulative), decibel(one.alone))
        table.add_row(plain(one.path), plain(one.format), one.by_itself, *ratios)
    console.print(table)
    say(console, f"{len(found.layers)} layers; the model's output: {decibel(found.output) or NO_NUMBER}")


def _batches(loaded: Loaded) -> list[Any]:
    """A language model reads 128 tokens of Python's documentation, another one its example inputs."""
    if loaded.tokenizer is None:
        return [loaded.example()]
    from ..text import pydoc_tokens

    return [(pydoc_tokens(loaded.tokenizer, count=128, length=128),)]
