"""`bf.save_checkpoint`: a quantized model as another program's checkpoint.

In: a model after `bf.quantize`, `bf.load` or `bf.load_checkpoint`. Out: a folder with config.json and
model.safetensors, in compressed-tensors' way, which vLLM and transformers load; or a GGUF file.

    bf.save_checkpoint(model, "tinyllama-w4a16")
    bf.save_checkpoint(model, "tinyllama-q8_0.gguf", like="tinyllama-f16.gguf")
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import nn

from ...formats import BitfoldError
from ..files.paths import named
from ..given_model import module_of
from .biases import bias_words
from .compressed_write import write_compressed
from .folder import write_folder
from .gguf_write import write_gguf


@torch.no_grad()
def save_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, like: str | os.PathLike[str] | None = None
) -> None:
    """Write `model` into the folder `path`, which is made if it is not there; or, if `path` ends in .gguf,
    into that file.

    The codes and scales written are the model's own. config.json is the model's configuration, if it has one
    as transformers' models do, with the quantization_config in it, and says the biases that `correct_bias`
    has added. A GGUF file takes its metadata (tokenizer,
    chat template) from `like`, another GGUF file of the same model.

    Raises BitfoldError for a model that is not quantized, or has a layer in a format that the other program
    has no word for; nothing is written then.
    """
    model = module_of(model, "bf.save_checkpoint")
    if named(path).suffix == ".gguf":
        return write_gguf(model, path, like=like)
    if like is not None:
        raise BitfoldError("like= is a GGUF file whose metadata a GGUF file takes over; give a path in .gguf")
    written = write_compressed(model)
    words = bias_words(model, {name for name in written.tensors if name.endswith(".bias")})
    config = _config(model) | words | {"quantization_config": written.config}
    return write_folder(path, written.tensors, config)


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return {}
    found: dict[str, Any] = json.loads(config.to_json_string())
    return found | {"architectures": [type(model).__name__]}
