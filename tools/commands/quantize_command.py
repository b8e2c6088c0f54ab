"""Quantize a model and save it as a safetensors file (no pickle, codes and scales in one canonical layout).

bitfold quantize --recipe int8_all -o smollm2.safetensors
bitfold quantize mine.py:build --recipe 'int4[g64]' --scope program -o program.safetensors
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace

from rich.console import Console

from ...formats import format
from ...formats.layout import default
from ...lowering import quantize, report, save
from ...lowering.files.paths import place_of
from .shared import add_model, add_recipe, add_target, read_model, read_recipe, say, size, waiting

ABOUT = "quantize a model into a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_recipe(parser)
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the safetensors file to write")
    parser.add_argument(
        "--scope",
        choices=("module", "program"),
        default="module",
        help="module: layer by layer, for any model (the default); program: the whole model as one graph",
    )
    add_target(parser)
    parser.add_argument("--layers", action="store_true", help="list every layer")


def run(arguments: argparse.Namespace, console: Console) -> None:
    recipe = read_recipe(arguments.recipe)
    place_of(arguments.out)
    loaded = read_model(arguments.model, console)
    program = arguments.scope == "program"
    began = time.perf_counter()
    with waiting(console, "quantizing") as progress:
        model = quantize(
            loaded.model,
            recipe,
            scope=arguments.scope,
            target=arguments.target,
            stored=loaded.stored,
            example_inputs=loaded.example() if program else None,
            progress=progress,
        )
        seconds = time.perf_counter() - began
        save(model, arguments.out, progress=progress)
    found = report(model)
    if arguments.layers:
        say(console, str(found))
    for text, count in Counter(in_file(layer.format) for layer in found.layers).items():
        say(console, f"{count} {'weight' if count == 1 else 'weights'} in {text}")
    for miss in found.misses:
        say(console, f"not given: {miss}", "yellow")
    say(
        console,
        f"{arguments.out}: {size(found.bytes_before)} became {size(found.bytes_after)} in {seconds:.1f} s",
    )


def in_file(text: str) -> str:
    """The format without the layout that a target likes: files keep every format's own."""
    held = format(text)
    return str(replace(held, layout=default(held.element.bits)))
