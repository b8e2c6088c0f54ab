"""Run a quantized model: a language model writes text, another is called on its inputs and compared.

bitfold run --recipe stored --prompt "Why is the sky blue?"
bitfold run --load smollm2.safetensors
bitfold run mine.py:build --recipe int8
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils import _pytree as pytree

from ...formats import BitfoldError
from ...lowering import load, quantize
from ...lowering.files.tensor_file import open_file
from ...passes.provenance import breaking_point
from ..models import Loaded
from ..trial import PROMPT
from .shared import add_model, add_recipe, add_target, read_model, read_recipe, say, waiting

ABOUT = "run a quantized model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    how = parser.add_mutually_exclusive_group(required=True)
    add_recipe(how, required=False)  # type: ignore[arg-type]
    how.add_argument(
        "--load", metavar="FILE", help="a file that `bitfold quantize` wrote, instead of a recipe"
    )
    add_target(parser)
    parser.add_argument("--prompt", default=PROMPT, help="what a language model is asked")
    parser.add_argument("--tokens", type=int, default=64, help="how much it may write (default: 64)")


def run(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.tokens < 1:
        raise BitfoldError(f"--tokens is {arguments.tokens}; it must be 1 or more")
    if arguments.recipe is not None:
        read_recipe(arguments.recipe)
    else:
        open_file(arguments.load)
    loaded = read_model(arguments.model, console)
    if loaded.tokenizer is not None:
        _write(_quantized(loaded, arguments, console), loaded.tokenizer, arguments, console)
        return
    wanted = _outputs(loaded.model, loaded.example())
    _compare(wanted, _outputs(_quantized(loaded, arguments, console), loaded.example()), console)


def _quantized(loaded: Loaded, arguments: argparse.Namespace, console: Console) -> Any:
    if arguments.load is not None:
        with console.status(f"loading {arguments.load}"):
            return load(arguments.load, into=loaded.model, target=arguments.target)
    with waiting(console, "quantizing") as progress:
        return quantize(
            loaded.model,
            arguments.recipe,
            target=arguments.target,
            stored=loaded.stored,
            example_inputs=loaded.inputs or None,
            progress=progress,
        )


@torch.inference_mode()
def _write(model: Any, tokenizer: Any, arguments: argparse.Namespace, console: Console) -> None:
    """Greedy, each token as it comes."""
    from transformers import TextStreamer

    text = arguments.prompt
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    say(console, arguments.prompt, "dim")
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=arguments.tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def _outputs(model: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The floating tensors that the model returns."""
    try:
        with torch.inference_mode():
            made = model(*inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BitfoldError(f"the model cannot be called on its inputs: {breaking_point(error)}") from error
    return [
        value for value in pytree.tree_leaves(made) if isinstance(value, Tensor) and value.is_floating_point()
    ]


def _compare(wanted: list[Tensor], got: list[Tensor], console: Console) -> None:
    for number, (a, b) in enumerate(zip(wanted, got, strict=True)):
        off = (a - b).double()
        noise, signal = float(off.square().sum()), float(a.double().square().sum())
        decibels = "equal" if noise == 0 else f"{10 * torch.log10(torch.tensor(signal / noise)):.1f} dB"
        largest = float(off.abs().max()) if off.numel() else 0.0
        say(
            console,
            f"output {number} {list(b.shape)}: signal to noise {decibels}, largest difference {largest:.3g}",
        )
