"""compressed-tensors written: a folded model as vLLM and transformers load it.

In: a model after `bf.quantize` or `bf.load`. Out: the tensors of model.safetensors, and the
quantization_config that says what they are: one group of layers for each pair of weight and input format.

    up: FoldedLinear int4[g128]
    ->  up.weight_packed int32 [N, K/8], up.weight_scale bf16 [N, K/128], up.weight_shape int64 [2]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import BitfoldError, Quantized, format
from ...formats.integer import Integer
from ..files.save import join
from ..folded import Folded, original_class
from .into import KEPT
from .layers import FoldedLayer, folded_layer
from .schemes import activation_args, storage, weight_args
from .words import to_words, zeros_to_words


@dataclass(frozen=True)
class Written:
    """`config` is the quantization_config."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def write_compressed(model: nn.Module) -> Written:
    """Raises BitfoldError, naming the layer, for one that compressed-tensors cannot say."""
    tensors: dict[str, Tensor] = {}
    groups: dict[tuple[str, str, bool], list[str]] = {}
    folded = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Folded)
    }
    if not folded:
        raise BitfoldError(f"nothing in this {type(model).__name__} is quantized; call bf.quantize first")
    for path, module in folded.items():
        try:
            layer = folded_layer(module)
            weight_args(layer.weight.format)
            key = str(layer.weight.format), layer.input, bool(layer.input_params)
            groups.setdefault(key, []).append(path)
            made = dict(_tensors(module, layer))
        except BitfoldError as error:
            raise BitfoldError(f"layer {path or '(the model)'}: {error}") from error
        tensors |= {join(path, name): tensor for name, tensor in made.items()}
    parts = {join(path, part) for path, module in folded.items() for part in module.parts}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *_kept_buffers(model)):
        if name not in parts:
            tensors[name] = tensor
    return Written(tensors, _config(model, groups))


def _kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict has."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield join(path, name), buffer


def _tensors(module: Folded, layer: FoldedLayer) -> Iterator[tuple[str, Tensor]]:
    weight, fmt = layer.weight, layer.weight.format
    assert weight.scales is not None and fmt.scale is not None
    way = storage(fmt, activations=bool(layer.input))
    if way == "pack-quantized":
        yield "weight_packed", to_words(fmt, weight.codes, weight.k)
        yield "weight_shape", torch.tensor([weight.codes.shape[0], weight.k])
    elif "pack" in way:
        yield "weight_packed", weight.codes
    elif isinstance(fmt.element, Integer):
        yield "weight", _signed(weight)
    else:
        yield "weight", weight.codes.view(torch.float8_e4m3fn)
    per_tensor = fmt.scale.granularity.cols is None and fmt.scale.granularity.rows is None
    yield "weight_scale", weight.scales.reshape(1) if per_tensor else weight.scales
    if weight.zeros is not None:
        if way == "pack-quantized" and not per_tensor:
            yield "weight_zero_point", zeros_to_words(fmt, weight.zeros)
        else:
            zeros = _signed_zeros(weight)
            yield "weight_zero_point", zeros.reshape(1) if per_tensor else zeros
    if weight.tensor_scale is not None:
        yield "weight_global_scale", _divisor(weight.tensor_scale, module)
    for name, part in zip(("input_scale", "input_zero_point"), layer.input_params, strict=False):
        yield name, part.reshape(1)


def _signed(weight: Quantized) -> Tensor:
    """int8 [N, K], one code a byte."""
    element = weight.format.element
    assert isinstance(element, Integer)
    codes = weight.format.unpack(weight.codes, weight.k)
    half = 1 << (element.bits - 1)
    return ((codes ^ half) - half if element.signed else codes - half).view(torch.int8)


def _signed_zeros(weight: Quantized) -> Tensor:
    element = weight.format.element
    assert isinstance(element, Integer) and weight.zeros is not None
    if element.signed:
        return weight.zeros
    return (weight.zeros - (1 << (element.bits - 1))).view(torch.int8)


def _divisor(tensor_scale: Tensor, module: Folded) -> Tensor:
    """NVFP4's second level as a divisor: the one that the codes came with if they came so, else the
    reciprocal, which gives the factor back but for its last bit.
    """
    came = module.__dict__.get(KEPT, {}).get("weight_global_scale")
    factor = tensor_scale.detach().to(torch.float32).reshape(1)
    if isinstance(came, Tensor) and torch.equal(
        1.0 / came.to(factor.device, torch.float32).reshape(1), factor
    ):
        return came
    return 1.0 / factor


def _config(model: nn.Module, groups: dict[tuple[str, str, bool], list[str]]) -> dict[str, Any]:
    quantized = {path for paths in groups.values() for path in paths}
    ways = {storage(format(weight), activations=bool(given)) for weight, given, _ in groups}
    only_linears = all(original_class(model.get_submodule(path)) is nn.Linear for path in quantized)
    listed = {}
    for index, ((weight, given, static), paths) in enumerate(groups.items()):
        inputs = activation_args(format(given), static=static) if given else None
        listed[f"group_{index}"] = {
            "targets": ["Linear"] if len(groups) == 1 and only_linears else sorted(paths),
            "weights": weight_args(format(weight)),
            "input_activations": inputs,
            "output_activations": None,
            "format": storage(format(weight), activations=bool(given)),
        }
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(ways)) if len(ways) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": listed,
        "ignore": sorted(
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and path not in quantized
        ),
        "kv_cache_scheme": None,
    }
