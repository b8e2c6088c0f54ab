"""Quantize SmolLM2-135M-Instruct with several recipes, run it with each, and print what it gained and lost.

Writes demo.json (the table as data) and demo.html (what the passes did) to --out. Takes some minutes on two
cores, most of them compiling. Needs no network.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from ..demo import BATCHES, RECIPES, STEPS, demo
from .shared import positive, read_recipe

ABOUT = "a real language model under several recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="RECIPE",
        help=f"a recipe to try (may be repeated; by default {', '.join(RECIPES)}); the first is the baseline",
    )
    parser.add_argument("--out", default="out", metavar="FOLDER", help="where the files go (default: out)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a CUDA GPU if there is one")
    parser.add_argument(
        "--batch", type=positive, action="append", help=f"may be repeated (default: {BATCHES})"
    )
    parser.add_argument("--steps", type=positive, default=STEPS, help=f"tokens to decode (default: {STEPS})")


def run(arguments: argparse.Namespace, console: Console) -> None:
    for recipe in arguments.recipe or ():
        read_recipe(recipe)
    demo(
        recipes=arguments.recipe or RECIPES,
        out=arguments.out,
        device=arguments.device,
        batches=arguments.batch or BATCHES,
        steps=arguments.steps,
        console=console,
    )
