"""Show what a saved file holds, or what the passes do to a model.

bitfold inspect m.safetensors                              formats, layers and bytes of a file
bitfold inspect --recipe 'int4[g64]' --html page.html      every pass on SmolLM2, as a page
bitfold inspect mine.py:build --pipeline 'annotate{recipe=int8},fold,fuse,lower{target=cpu}' --code
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ...formats import BitfoldError
from ...lowering import Pipeline
from ...lowering.files.paths import place_of
from ...lowering.files.tensor_file import TensorFile, open_file
from ...lowering.parameters import with_all_names
from ...passes import capture, state
from ...passes.annotate import Annotate
from ...passes.fold import Fold
from ...passes.fuse import Fuse
from ..lowered import twin
from ..models import Loaded
from ..page import Logits
from ..viz import node_errors, viz
from .shared import add_model, add_recipe, plain, read_model, read_recipe, say, size

ABOUT = "show what a file holds, or what the passes do to a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    how = parser.add_mutually_exclusive_group()
    add_recipe(how, required=False)  # type: ignore[arg-type]
    how.add_argument(
        "--pipeline", metavar="TEXT", help="passes in order, such as 'annotate{recipe=int4},fold,fuse'"
    )
    parser.add_argument(
        "--html", metavar="PAGE", help="write the trace as a page, with the error of each value"
    )
    parser.add_argument("--code", action="store_true", help="print the graph after the last pass")


def run(arguments: argparse.Namespace, console: Console) -> None:
    place = Path(arguments.model)
    if place.suffix == ".safetensors" or (place.is_file() and place.suffix != ".gguf"):
        _file(open_file(arguments.model), console)
        return
    if arguments.recipe is None and arguments.pipeline is None:
        raise BitfoldError("say what to do to the model: --recipe RECIPE or --pipeline TEXT")
    pipeline = _pipeline(arguments)
    if arguments.html is not None:
        place_of(arguments.html)
    loaded = read_model(arguments.model, console)
    with torch.no_grad():
        _passes(loaded, pipeline, arguments, console)


def _pipeline(arguments: argparse.Namespace) -> Pipeline:
    if arguments.pipeline is not None:
        return Pipeline.parse(arguments.pipeline)
    return Pipeline([Annotate(recipe=str(read_recipe(arguments.recipe))), Fold(), Fuse()])


def _passes(loaded: Loaded, pipeline: Pipeline, arguments: argparse.Namespace, console: Console) -> None:
    inputs = loaded.example()
    language = loaded.tokenizer is not None
    model = Logits(loaded.model) if language else loaded.model
    with console.status("capturing the model as one graph"):
        gm = capture(model, inputs, dynamic="batch+sequence" if language else None)
        reference = twin(gm)
    prefix = "model." if language else ""
    state(gm).stored = with_all_names({prefix + path: q for path, q in loaded.stored.items()}, model)
    with console.status(f"running {pipeline}"):
        trace = pipeline.run(gm)
    say(console, str(trace))
    if arguments.code:
        say(console, trace.steps[-1].code)
    if arguments.html:
        with console.status("comparing with the unquantized model"):
            page = viz(trace, arguments.html, errors=node_errors(reference, gm, inputs))
        say(console, f"{page} shows it")


def _file(file: TensorFile, console: Console) -> None:
    header = file.header
    made = header.get("bitfold", "?")
    say(console, f"{file.path}: a {header['kind']} saved by bitfold {made}")
    table = Table(box=None, pad_edge=False)
    for head, side in (("format", "left"), ("weights", "right"), ("shapes", "left"), ("bytes", "right")):
        table.add_column(head, justify=side, overflow="fold")  # type: ignore[arg-type]
    rest = dict.fromkeys(header["tensors"])
    for text, found in sorted(_by_format(header).items()):
        shapes = sorted({"x".join(map(str, shape)) for shape, _ in found})
        names = {name for _, parts in found for name in parts if name in rest}
        count = sum(_bytes(file, name) for name in names)
        table.add_row(plain(text), str(len(found)), ", ".join(shapes), size(count))
        for name in names:
            del rest[name]
    table.add_row("as they were", str(len(rest)), "", size(sum(_bytes(file, name) for name in rest)))
    console.print(table)
    for name, first in header["tied"].items():
        say(console, f"{name} is {first}", "dim")


def _by_format(header: dict[str, Any]) -> dict[str, list[tuple[list[int], list[str]]]]:
    """Format -> (shape, names of the stored tensors) of each weight."""
    from ...lowering.files.save import join
    from ...lowering.install import canonical_parts

    found: dict[str, list[tuple[list[int], list[str]]]] = defaultdict(list)
    if header["kind"] == "program":
        for parts, text, k in canonical_parts(header["graph"]):
            found[text].append(([k], list(parts)))
        return found
    for path, entry in header["modules"].items():
        for weight in entry["weights"]:
            names = [join(path, part) for part in weight["parts"]]
            found[weight["format"]].append((weight["shape"], names))
    return found


def _bytes(file: TensorFile, name: str) -> int:
    return prod(file.shapes[name]) * file.dtypes[name].itemsize
