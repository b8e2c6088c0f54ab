"""What a skeleton has under a name: a parameter or a buffer, or codes in the place of a parameter.

In: a model, quantized or not, with numbers or on meta. Out: shape and dtype of what a tensor would replace.

    place_in(model, "up.weight")  ->  Place((128, 64), float32, ...), also when up is folded
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..folded import Folded
from .save import join


def tensors_in(model: nn.Module, path: str) -> set[str]:
    """Names of the tensors that a module has besides what folding gave it."""
    module = submodule_in(model, path)
    if module is None:
        return set()
    given = set(module.parts) if isinstance(module, Folded) else set()
    held = {**module._parameters, **module._buffers}
    return {name for name, tensor in held.items() if tensor is not None} - given


def submodule_in(model: nn.Module, path: str) -> nn.Module | None:
    """The module at `path`, if there is one."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def device_for(model: nn.Module, given: torch.device | None) -> torch.device:
    """Where tensors of a file go: as told, else where the model's own are, else the CPU."""
    if given is not None:
        return given
    devices = [parameter.device for parameter in model.parameters() if not parameter.is_meta]
    return devices[0] if devices else torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Where an unquantized tensor goes. `dtype`: None on meta, where the file's is as good."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    requires_grad: bool = True
    buffer: bool = False


def place_in(model: nn.Module, name: str) -> Place | None:
    """The parameter or buffer of this name, also one that is codes now."""
    owner, _, last = name.rpartition(".")
    module = submodule_in(model, owner)
    if module is None:
        return None
    parameter, buffer = module._parameters.get(last), module._buffers.get(last)
    found = buffer if parameter is None else parameter
    if found is not None:
        dtype = None if found.is_meta else found.dtype
        return Place(tuple(found.shape), dtype, found.requires_grad, buffer=parameter is None)
    if isinstance(module, Folded):
        for weight in module.folded_weights:
            if weight.name == last:
                on_meta = getattr(module, weight.parts[0]).is_meta
                return Place(weight.shape, None if on_meta else module.compute_dtype)
    return None


def parameters_in(model: nn.Module) -> Iterator[str]:
    """Every parameter's name, the folded ones' too, but not those of the codes."""
    for path, module in model.named_modules(remove_duplicate=False):
        parts = module.parts if isinstance(module, Folded) else ()
        folded = module.folded_weights if isinstance(module, Folded) else ()
        held = (name for name, given in module._parameters.items() if given is not None and name not in parts)
        yield from (join(path, name) for name in (*held, *(weight.name for weight in folded)))


def kind(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    """What dtypes have in common whose numbers may be copied into each other."""
    return dtype.is_floating_point, dtype.is_complex, dtype is torch.bool
