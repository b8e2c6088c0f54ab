"""Buffers that no checkpoint holds because they follow from the configuration: rotary frequencies.

In: a transformers model on meta. Out: their names; and the buffers, computed by the model's own code.

    LlamaForCausalLM on meta  ->  model.rotary_emb.inv_freq float32 [head / 2]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..files.save import join


def computed_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers on meta that `compute_buffers` gives numbers."""
    return {join(path, name) for path, module in _rotary(model) for name in module._buffers}


def compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Give those buffers their numbers, in place."""
    for _, module in _rotary(model):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        model._init_weights(module)  # type: ignore[operator]


def _rotary(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # What transformers itself looks for when it fills a model that was made on meta.
    if not hasattr(model, "_init_weights"):
        return
    for path, module in list(model.named_modules()):
        known = "RotaryEmbedding" in type(module).__name__ and hasattr(module, "original_inv_freq")
        if known and any(one is not None and one.is_meta for one in module._buffers.values()):
            yield path, module
