"""The parameters of a model before it is quantized: their names, their numbers, and codes given for them.

In: a model. Out: every path of each parameter, or one clear sentence about what is wrong with them.

    parameter_names(llama)[id(llama.lm_head.weight)]  ->  ["model.embed_tokens.weight", "lm_head.weight"]
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from ..formats import BitfoldError, Quantized, nearest


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """Every path of every parameter, by the parameter's identity: more than one if it is tied."""
    names: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(path)
    return names


def with_all_names(stored: Mapping[str, Quantized], model: nn.Module) -> dict[str, Quantized]:
    """The user's codes under every path of their parameter. Raises BitfoldError for what is no parameter."""
    by_path = {path: paths for paths in parameter_names(model).values() for path in paths}
    out: dict[str, Quantized] = {}
    for path, codes in stored.items():
        if path not in by_path:
            raise BitfoldError(
                f"stored has codes for {path!r}, which is no parameter of this {type(model).__name__}"
                f"{nearest(path, by_path)}"
            )
        out.update(dict.fromkeys(by_path[path], codes))
    return out


def check_parameters(model: nn.Module) -> None:
    """Raises BitfoldError for parameters that hold no numbers yet, or not all of them."""
    for path, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise BitfoldError(
                f"{path} is a lazy parameter without a shape; run the model once before bf.quantize"
            )
        if isinstance(parameter, DTensor):
            raise BitfoldError(f"{path} is sharded already; call bf.quantize before fully_shard")
        if parameter.is_meta:
            raise BitfoldError(
                f"{path} is on the meta device and has no numbers; load the weights before bf.quantize, or "
                "use bf.load(path, into=model) for a model that was saved quantized"
            )
