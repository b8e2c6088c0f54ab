"""Draw a model's kernels under the roofline, and recipes against each other, as PNG files or in a page.

bitfold plot --recipe int8 --roofline roof.png                              SmolLM2
bitfold plot --recipe int8 --recipe int4 --recipe mxfp4 --pareto recipes.png --html page.html
bitfold plot mine.py:build --recipe int8 --chrome trace.json                for https://ui.perfetto.dev
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from ...formats import BitfoldError
from ...lowering.diagnose import decibel
from ...lowering.files.paths import place_of
from ..chrome import export
from ..inspection import Inspection
from ..pareto import Point, points
from ..plots import pareto, roofline
from ..viz import viz
from .looking import add_looking, look_at, pipelines, prepared
from .shared import plain, read_model, say

ABOUT = "draw kernels under the roofline and recipes against each other"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_looking(parser, several=True)
    parser.add_argument(
        "--roofline", metavar="PNG", help="the first recipe's kernels under the device's roof"
    )
    parser.add_argument("--pareto", metavar="PNG", help="bits, error and time of all recipes")
    parser.add_argument("--chrome", metavar="JSON", help="a profile of the first recipe, with provenance")
    parser.add_argument("--html", metavar="PAGE", help="the page of the first recipe, with both plots in it")


def run(arguments: argparse.Namespace, console: Console) -> None:
    places = [arguments.roofline, arguments.pareto, arguments.chrome, arguments.html]
    if not any(places):
        raise BitfoldError("say what to draw: --roofline PNG, --pareto PNG, --chrome JSON or --html PAGE")
    for place in filter(None, places):
        place_of(place)
    if arguments.pareto and len({*arguments.recipe, *arguments.pipeline}) < 2:
        raise BitfoldError("--pareto compares recipes: give two or more")
    loaded = prepared(read_model(arguments.model, console), arguments)
    names = [*arguments.recipe, *arguments.pipeline]
    found = {
        name: look_at(loaded, steps, arguments, console)
        for name, steps in zip(names, pipelines(arguments, loaded), strict=True)
    }
    first, compared = found[names[0]], points(found)
    console.print(_table(compared))
    _draw(arguments, console, first, compared)
    if arguments.chrome:
        say(console, f"{export(first, loaded.example(), arguments.chrome)} is for https://ui.perfetto.dev")


def _draw(arguments: argparse.Namespace, console: Console, first: Inspection, all: tuple[Point, ...]) -> None:
    if arguments.roofline:
        say(console, f"{roofline(first, arguments.roofline)} shows the kernels")
    if arguments.pareto:
        say(console, f"{pareto(all, arguments.pareto)} shows the recipes")
    if arguments.html:
        say(console, f"{viz(first, arguments.html, pareto=all)} shows it")


def _table(found: tuple[Point, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in ("recipe", "bits", "signal to noise", "time", "on the front"):
        table.add_column(head, justify="left" if head == "recipe" else "right")
    for one in found:
        seconds = "" if one.seconds is None else f"{1e3 * one.seconds:.2f} ms"
        front = "yes" if one.front else ""
        table.add_row(plain(one.recipe), f"{one.bits:.2f}", decibel(one.sqnr_db), seconds, front)
    return table
