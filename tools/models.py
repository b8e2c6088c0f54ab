"""A model from the command line's word for it.

In: `smollm2`, the path of a GGUF file of that model, a folder that transformers saved, or `FILE.py:NAME` (a
function that returns a module, or a module and the inputs to call it with). Out: a `Loaded`.

    load_model("smollm2")          ->  Loaded(LlamaForCausalLM, tokenizer, stored codes)
    load_model("mine.py:build")    ->  Loaded(whatever build() returned)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..formats import BitfoldError, Quantized
from ..passes.provenance import breaking_point
from .plugins import import_file

HELP = "smollm2 (the default), FILE.gguf of that model, a FOLDER saved by transformers, or FILE.py:FUNCTION"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode. A language model has a tokenizer; another one has example inputs."""

    model: Any
    tokenizer: Any = None
    stored: Mapping[str, Quantized] = field(default_factory=dict)
    inputs: tuple[Any, ...] = ()

    def example(self) -> tuple[Any, ...]:
        """Inputs that the model can be called with: the given ones, or a few tokens."""
        if self.tokenizer is not None:
            ids = self.tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
            return (ids["input_ids"],)
        if not self.inputs:
            raise BitfoldError(
                "this needs inputs to call the model with: let the function return (model, inputs)"
            )
        return self.inputs


def load_model(text: str) -> Loaded:
    """Raises BitfoldError for a text that names no model."""
    if text == "smollm2" or text.endswith(".gguf"):
        from .smollm2 import load_smollm2

        found = load_smollm2(None if text == "smollm2" else text)
        return Loaded(found.model, found.tokenizer, found.stored)
    path, colon, name = text.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_function(Path(path), name)
    if (Path(text) / "config.json").is_file():
        return _from_folder(text)
    raise BitfoldError(f"there is no model {text!r}; give {HELP}")


def _from_function(path: Path, name: str) -> Loaded:
    build = getattr(import_file(path), name, None)
    if not callable(build):
        raise BitfoldError(f"{path} has no function {name!r}")
    try:
        made = build()
    except Exception as error:
        raise BitfoldError(f"{name} in {path} failed: {breaking_point(error)}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, ())
    if not isinstance(model, nn.Module):
        raise BitfoldError(
            f"{name} in {path} returned {type(made).__name__}; it must return an nn.Module, or a module and "
            "its inputs"
        )
    if isinstance(inputs, Mapping):
        raise BitfoldError(f"{name} in {path} returned inputs by keyword; give them in order, as a tuple")
    return Loaded(model.eval(), inputs=(inputs,) if isinstance(inputs, Tensor) else tuple(inputs))


def _from_folder(text: str) -> Loaded:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise BitfoldError("a folder is read by transformers: run `pip install 'bitfold[hf]'`") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(text, local_files_only=True)
        return Loaded(model.eval(), AutoTokenizer.from_pretrained(text, local_files_only=True))
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BitfoldError(f"transformers cannot read a language model from {text}: {reason}") from error
