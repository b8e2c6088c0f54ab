"""What several commands say alike: how a model and a recipe are named, how sizes and waits are shown.

In: an argparse parser, or a console. Out: the options on the parser; a progress bar; a size as text.

    add_model(parser); add_recipe(parser)
    with waiting(console, "quantizing") as report: quantize(model, recipe, progress=report)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from ...formats import BitfoldError
from ...passes.recipes import Recipe
from ..models import HELP, Loaded, load_model
from ..progress import progress_bar

Report = Callable[[str, int, int], None]


def add_model(parser: argparse.ArgumentParser) -> None:
    """`MODEL`, by default SmolLM2."""
    parser.add_argument("model", nargs="?", default="smollm2", metavar="MODEL", help=HELP)


def add_recipe(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--recipe`."""
    parser.add_argument(
        "--recipe", required=required, help="a recipe's name, a format such as int4[g64], or a JSON file"
    )


def add_target(parser: argparse.ArgumentParser) -> None:
    """`--target`, by default that of the device."""
    parser.add_argument(
        "--target", help="what it shall run on: cpu, cuda, reference, ... (by default the device)"
    )


def read_recipe(text: str) -> Recipe:
    """The recipe, found wrong before any work is done for it. Raises BitfoldError."""
    recipe = Recipe.parse(text)
    if recipe.calibrated:
        raise BitfoldError(
            f"recipe {recipe.name!r} finds ranges by calibration, and the command line has no data for that; "
            "take a dynamic one, or call bf.quantize(model, recipe, calibration=batches)"
        )
    return recipe


def read_model(text: str, console: Console) -> Loaded:
    """The model, with a spinner: SmolLM2 takes some seconds."""
    with console.status(f"reading {text}"):
        return load_model(text)


def say(console: Console, text: str, style: str = "") -> None:
    """Plain text, not wrapped: brackets and numbers in it are just that."""
    console.print(text, style=style or None, highlight=False, markup=False, soft_wrap=True)


def plain(text: str) -> str:
    """A table's cell: brackets are no markup."""
    return escape(text)


def size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


@contextmanager
def waiting(console: Console, what: str) -> Iterator[Report]:
    """A progress bar that is gone when the wait is over."""
    with progress_bar(console) as show:
        task = show.add_task(what, total=None)
        yield lambda step, done, total: show.update(
            task, description=step, completed=done, total=total or None
        )


def positive(text: str) -> int:
    """An argparse type: a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above zero")
    return int(text)
