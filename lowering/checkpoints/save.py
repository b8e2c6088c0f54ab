"""`bf.save_checkpoint`: a quantized model as another program's checkpoint.

In: a model after `bf.quantize`, `bf.load` or `bf.load_checkpoint`. Out: a folder with config.json and
model.safetensors, in compressed-tensors' way, which vLLM and transformers load.

    bf.save_checkpoint(model, "tinyllama-w4a16")
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import nn

from ..given_model import module_of
from .compressed_write import write_compressed
from .folder import write_folder


@torch.no_grad()
def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write `model` into the folder `path`, which is made if it is not there.

    The codes and scales written are the model's own. config.json is the model's configuration, if it has one
    as transformers' models do, with the quantization_config in it.

    Raises BitfoldError for a model that is not quantized, or has a layer in a format that compressed-tensors
    has no word for; nothing is written then.
    """
    model = module_of(model, "bf.save_checkpoint")
    written = write_compressed(model)
    write_folder(path, written.tensors, _config(model) | {"quantization_config": written.config})


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return {}
    found: dict[str, Any] = json.loads(config.to_json_string())
    return found | {"architectures": [type(model).__name__]}
