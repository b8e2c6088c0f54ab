"""Find the fastest kernels for a model's layers, or for weights of given shapes, on the GPU that is here.

What is found is kept in a file of the user's and used from then on; see bitfold.codegen.table.

  bitfold tune --recipe int4                            the layers of SmolLM2, one token and sixteen
  bitfold tune mine.py:build --recipe int8 --ms 1 64
  bitfold tune 28672x4096 4096x14336 --recipe 'int4[g128]' --ms 1 16 128 --seconds 120
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

from ...codegen import CodegenError, GemmSpec, kernel_layout
from ...codegen.device import present
from ...codegen.lanes import LANE_TYPES
from ...codegen.table import user_file
from ...codegen.tune import Row, best_rows, plan, tune
from ...formats import BitfoldError, Format, format
from ...lowering import quantize, report
from ...passes.recipes import Recipe
from ...passes.rules import STORED, Site
from ..models import HELP
from .shared import plain, positive, read_model, read_recipe, say, waiting

ABOUT = "find the fastest kernels on this GPU"
_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="*", default=["smollm2"], metavar="MODEL|NxK", help=f"{HELP}; or a weight's shape"
    )
    parser.add_argument(
        "--recipe", required=True, help="a recipe's name, a format such as int4[g64], or a JSON file"
    )
    parser.add_argument(
        "--ms", type=positive, nargs="+", default=[1, 16], metavar="M", help="rows of x (default: 1 16)"
    )
    parser.add_argument("--dtype", choices=sorted(LANE_TYPES), default="bf16", help="of x (default: bf16)")
    parser.add_argument("--top", type=positive, default=8, help="schedules tried of each (default: 8)")
    parser.add_argument("--seconds", type=positive, default=600, help="at most (default: 600)")
    parser.add_argument("--show", action="store_true", help="say what would be tried, without a GPU")


def run(arguments: argparse.Namespace, console: Console) -> None:
    recipe = read_recipe(arguments.recipe)
    if not arguments.show and not torch.cuda.is_available():
        raise BitfoldError(
            "tuning measures kernels on a CUDA GPU, and there is none here; --show says what would be tried"
        )
    specs: dict[GemmSpec, None] = {}
    for what in arguments.what:
        specs.update(dict.fromkeys(specs_of(what, recipe, arguments.dtype, console)))
    if not specs:
        raise BitfoldError(f"recipe {recipe.name!r} leaves nothing there for a kernel to multiply with")
    wanted = [(spec, m) for spec in specs for m in arguments.ms]
    if arguments.show:
        for spec, m in wanted:
            say(console, f"{spec}, M = {m}: {'; '.join(plan(spec, m, present(), arguments.top).schedules)}")
        return
    rows: list[Row] = []
    with waiting(console, "tuning") as progress:

        def told(row: Row) -> None:
            rows.append(row)
            progress(f"{row['spec']}, M = {row['m']}", len(rows), len(wanted) * arguments.top)

        tune(wanted, top=arguments.top, seconds=float(arguments.seconds), report=told)
    console.print(table(rows))
    say(console, f"kept in {user_file(present())}")


def specs_of(what: str, recipe: Recipe, lane: str, console: Console) -> Iterator[GemmSpec]:
    """The kernels of a model's layers, or of one weight of a given shape."""
    shape = _SHAPE.fullmatch(what)
    if shape is not None:
        n, k = int(shape[1]), int(shape[2])
        rule = recipe.rule(Site(("linear",), "linear", n, k, n * k))
        if rule is None or not rule.weight or rule.weight == STORED:
            raise BitfoldError(f"recipe {recipe.name!r} gives a linear of {what} no format to be stored in")
        yield from _spec(format(rule.weight), n, k, lane, rule.input)
        return
    loaded = read_model(what, console)
    with waiting(console, "quantizing") as progress:
        model = quantize(loaded.model, recipe, stored=loaded.stored, progress=progress)
    for layer in report(model).layers:
        if len(layer.shape) == 2:
            n, k = layer.shape
            rule = recipe.rule(Site((layer.path,), "linear", n, k, n * k))
            yield from _spec(format(layer.format), n, k, lane, rule.input if rule is not None else "")


def _spec(weight: Format, n: int, k: int, lane: str, activation: str) -> Iterator[GemmSpec]:
    """The kernel, if there is one: for activations in codes where kernels multiply those, else in `lane`."""
    given = format(activation) if activation else None
    for codes in [given, None] if given is not None else [None]:
        laid_out = kernel_layout(weight, k, codes)
        if laid_out is None:
            continue
        try:
            yield (
                GemmSpec(laid_out, n, k, lane)
                if codes is None
                else GemmSpec(laid_out, n, k, lane, activation=codes)
            )
        except CodegenError:
            continue
        return


def table(rows: list[Row]) -> Table:
    """The best of each kernel, and what ran before it was tuned."""
    first: dict[tuple[str, int], float] = {}
    for row in rows:
        if "us" in row:
            first.setdefault((row["spec"], row["m"]), row["us"])
    out = Table(box=None, pad_edge=False)
    for head in ("kernel", "M", "us", "untuned", "schedule"):
        out.add_column(head, justify="right" if head in ("M", "us", "untuned") else "left")
    for row in best_rows(rows):
        before = first[row["spec"], row["m"]]
        cells = (plain(row["spec"]), str(row["m"]), f"{row['us']:.1f}", f"{before:.1f}", row["schedule"])
        out.add_row(*cells)
    return out
