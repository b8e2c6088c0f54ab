"""Show what passes do to a model as a page: every stage, errors, times, kernels, tensors; or two recipes side
by side.

bitfold viz --recipe 'int4[g64]' -o page.html             SmolLM2
bitfold viz --recipe int8 --recipe int4 -o page.html      two recipes side by side
bitfold viz mine.py:build --recipe int8 --serve           on http://127.0.0.1:8000, anew when mine.py changes
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ...formats import BitfoldError
from ...lowering.files.paths import place_of
from ..serve import serve
from ..text_file import write_text
from ..viz import page_text
from .looking import add_looking, look_at, pipelines, prepared
from .shared import read_model, say

ABOUT = "show what the passes do to a model as a page, or two recipes side by side"
PORT = 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_looking(parser, several=True)
    parser.add_argument("-o", "--output", metavar="PAGE", help="the file to write")
    parser.add_argument(
        "--serve",
        nargs="?",
        type=int,
        const=PORT,
        metavar="PORT",
        help=f"serve the page to this machine (port {PORT} if none is given) instead of writing a file",
    )


def run(arguments: argparse.Namespace, console: Console) -> None:
    if (arguments.output is None) == (arguments.serve is None):
        raise BitfoldError("say where the page goes: -o PAGE, or --serve")
    if len(arguments.recipe) + len(arguments.pipeline) > 2:
        raise BitfoldError(
            "a page shows one trace, or two side by side; give at most two recipes or pipelines"
        )
    if arguments.serve is not None:
        # A model that comes from a file is read anew when the file changes.
        file = Path(arguments.model.rpartition(":")[0]) if ".py:" in arguments.model else None
        serve(lambda: page(arguments, console), arguments.serve, file, lambda text: say(console, text))
        return
    place_of(arguments.output)
    say(console, f"{write_text(arguments.output, page(arguments, console))} shows it")


def page(arguments: argparse.Namespace, console: Console) -> str:
    """The page's text."""
    loaded = prepared(read_model(arguments.model, console), arguments)
    found = [look_at(loaded, one, arguments, console) for one in pipelines(arguments, loaded)]
    return page_text(found[0], other=found[1] if len(found) > 1 else None)
