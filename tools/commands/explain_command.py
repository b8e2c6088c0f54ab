"""Say what became of a model, in the terminal: what to look at first, and every module's format, error and
time.

bitfold explain --recipe 'int4[g64]'                     SmolLM2
bitfold explain mine.py:build --recipe int8_dynamic
bitfold explain mine.py:build --pipeline 'annotate{recipe=int8},fold,fuse' --all
bitfold explain mine.py:build --recipe int4 --target cuda_on_paper --dtype bf16    a GPU's kernels, without
one"""

from __future__ import annotations

import argparse

from rich.console import Console

from ...formats import BitfoldError
from ...lowering.files.paths import place_of
from ..explain import explain
from ..explain.show import show
from ..viz import viz
from .looking import add_looking, look_at, pipelines, prepared
from .shared import read_model, say

ABOUT = "say what became of each module, what was not done and why, and what to try"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_looking(parser)
    parser.add_argument("--all", action="store_true", help="every finding, not the first twelve")
    parser.add_argument("--html", metavar="PAGE", help="write the page of `bitfold viz` too")


def run(arguments: argparse.Namespace, console: Console) -> None:
    if len(arguments.recipe) + len(arguments.pipeline) > 1:
        raise BitfoldError("explain takes one recipe or pipeline; `bitfold viz` shows two side by side")
    if arguments.html:
        place_of(arguments.html)
    loaded = prepared(read_model(arguments.model, console), arguments)
    (pipeline,) = pipelines(arguments, loaded)
    found = look_at(loaded, pipeline, arguments, console)
    show(explain(found), console, all=arguments.all)
    if arguments.html:
        say(console, f"{viz(found, arguments.html)} shows it")
