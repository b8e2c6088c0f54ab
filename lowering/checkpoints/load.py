"""`bf.load_checkpoint`: a checkpoint of another program into a model, in the codes that it holds.

In: a folder or file, and a skeleton of the same architecture. Out: the skeleton, its quantized layers folded.

    with torch.device("meta"): skeleton = LlamaForCausalLM(config)
    bf.load_checkpoint("tinyllama-w4a16", into=skeleton)

Who wrote it is read from it: config.json's quantization_config, or the file itself.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from ...formats import BitfoldError
from ..files.paths import named
from ..given_model import module_of
from ..tracing import TRACING
from .by_column import read_by_column
from .checkpoint import Checkpoint
from .compressed_read import read_compressed
from .folder import read_folder
from .gguf_read import read_gguf
from .into import put
from .torchao_read import read_torchao_file, read_torchao_folder


@torch.inference_mode(False)
def load_checkpoint(
    path: str | os.PathLike[str],
    into: nn.Module,
    *,
    activations: bool = True,
    target: str | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Load what another program quantized: a folder of compressed-tensors, AutoAWQ, GPTQ or torchao; a GGUF
    file; or a state dict of torchao's tensors that torch.save wrote.

    into         the skeleton: its architecture, with or without numbers
    activations  whether layers quantize their inputs where the checkpoint says so
    target       where it shall run; by default that of the device
    device       where the tensors go; by default where the skeleton's are, or the CPU for one on meta

    No number is rounded again: codes, scales and zero points are the checkpoint's. Unquantized tensors, and
    what quantized layers compute in, take the skeleton's dtype; where it is on meta, the checkpoint's.

    Returns `into`. Raises BitfoldError, with the skeleton as it was, for a checkpoint that is damaged, of
    another architecture, or that says something no format here can keep.
    """
    with TRACING:
        model = module_of(into, "bf.load_checkpoint(path, into=...)")
        put(
            _read(named(path), model, activations),
            model,
            target=target,
            device=None if device is None else torch.device(device),
        )
    return into


def _read(path: Path, model: nn.Module, activations: bool) -> Checkpoint:
    if path.suffix == ".gguf":
        return read_gguf(path, model)
    if path.is_file():
        return read_torchao_file(path, activations=activations)
    folder = read_folder(path)
    method = folder.quantization.get("quant_method")
    if method == "compressed-tensors":
        return read_compressed(folder, model, activations=activations)
    if method == "torchao":
        return read_torchao_folder(folder, activations=activations)
    if method in ("awq", "gptq") or (method is None and any(n.endswith(".qweight") for n in folder.tensors)):
        return read_by_column(folder, model)
    if method is None:
        raise BitfoldError(
            f"{path} has no quantization_config, so nothing in it is quantized; load it by its own means and "
            "call bf.quantize"
        )
    raise BitfoldError(
        f"{path} was quantized by {method!r}; compressed-tensors, awq, gptq and torchao are read"
    )
