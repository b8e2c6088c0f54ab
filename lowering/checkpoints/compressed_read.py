"""compressed-tensors read: what vLLM loads, in the codes and scales that it holds.

In: a folder whose config.json has such a quantization_config, and the skeleton, whose classes the targets
("Linear", "re:.*gate.*") speak of. Out: a `Checkpoint`.

    up.weight_packed int32 [N, K/8], up.weight_scale bf16 [N, K/128], up.weight_shape
    ->  stored["up.weight"] = Stored(Quantized(int4[g128], ..))

NVFP4's second level is a divisor there and a factor here; the divisor is kept beside the codes, so that
writing gives it back bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import BitfoldError, Format, Quantized
from ...formats.integer import Integer
from ..files.skeleton import submodule_in
from .checkpoint import Checkpoint, Stored
from .folder import Folder
from .schemes import activation_format, weight_format
from .words import from_words, zeros_from_words

_OF_A_WEIGHT = (
    "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale",
    "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale", "output_scale",
    "output_zero_point",
)  # fmt: skip
_OF_A_CACHE = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")
_WITHOUT_CODES = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")


@dataclass(frozen=True)
class Scheme:
    """One group of the configuration: which layers it means, and the arguments of their numbers."""

    targets: tuple[str, ...]
    weights: Mapping[str, Any] | None
    inputs: Mapping[str, Any] | None
    outputs: Mapping[str, Any] | None


def read_compressed(folder: Folder, model: nn.Module, *, activations: bool = True) -> Checkpoint:
    """Raises BitfoldError, naming the layer, for what cannot be kept as it is."""
    config = folder.quantization
    schemes = _schemes(folder, config)
    ignore = _targets(folder, "ignore", config.get("ignore"))
    tensors = dict(folder.tensors)
    unused = {
        name: "a KV cache's scale; a cache is quantized by a recipe's rule of its own"
        for name in tensors
        if name.rpartition(".")[2] in _OF_A_CACHE
    }
    stored: dict[str, Stored] = {}
    for path in _quantized(tensors):
        found = {name: tensors.pop(f"{path}.{name}", None) for name in _OF_A_WEIGHT}
        module = submodule_in(model, path)
        if module is None:
            raise BitfoldError(
                f"{folder.path} has codes for {path!r}, which this {type(model).__name__} does not have"
            )
        scheme = _scheme_of(folder, schemes, ignore, path, module)
        try:
            weight, kept = _weight(scheme, found)
            given = _activations(scheme, found) if activations else ("", ())
        except BitfoldError as error:
            raise BitfoldError(f"{folder.path}, layer {path}: {error}") from error
        stored[f"{path}.weight"] = Stored(weight, *given, kept=kept)
    _check_none_left(folder, schemes, ignore, model, stored)
    plain = {name: tensor for name, tensor in tensors.items() if name not in unused}
    return Checkpoint(str(folder.path), plain, stored, folder.dtype, unused)


def _schemes(folder: Folder, config: Mapping[str, Any]) -> list[Scheme]:
    sparse, way = config.get("sparsity_config") or {}, config.get("format")
    _check_kind(folder, "sparsity_config", sparse, Mapping)
    if (isinstance(way, str) and way in _WITHOUT_CODES) or sparse.get("format", "dense") != "dense":
        raise BitfoldError(
            f"{folder.path} is stored as {way if way in _WITHOUT_CODES else sparse.get('format')}, a sparse "
            "layout that is not read here; decompress it with the library that wrote it"
        )
    groups = config.get("config_groups") or {}
    _check_kind(folder, "config_groups", groups, Mapping)
    found = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise BitfoldError(
                f"{folder.path}: group {name!r} of the quantization config names a preset; write its "
                "arguments out"
            )
        arguments = [group.get(part) for part in ("weights", "input_activations", "output_activations")]
        for one in arguments:
            _check_kind(folder, f"{name}: arguments of numbers", {} if one is None else one, Mapping)
        found.append(Scheme(_targets(folder, f"{name}: targets", group.get("targets")), *arguments))
    if not found:
        raise BitfoldError(
            f"{folder.path}: its quantization config has no groups, so it says of no layer how"
        )
    return found


def _targets(folder: Folder, name: str, given: Any) -> tuple[str, ...]:
    """Names and patterns of layers, each a pattern that compiles."""
    given = [] if given is None else given
    _check_kind(folder, name, given, list)
    for target in given:
        _check_kind(folder, f"{name}: {target!r}", target, str)
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise BitfoldError(f"{folder.path}: {name}: {target!r} is no pattern ({error})") from error
    return tuple(given)


def _check_kind(folder: Folder, name: str, given: object, kind: type) -> None:
    if not isinstance(given, kind):
        raise BitfoldError(
            f"{folder.path}: {name} of the quantization config is a {type(given).__name__} where a "
            f"{kind.__name__.lower()} is expected; copy the checkpoint again"
        )


def _quantized(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Paths of the layers that have scales."""
    yield from sorted(
        {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    )


def _scheme_of(
    folder: Folder, schemes: list[Scheme], ignore: tuple[str, ...], path: str, module: nn.Module
) -> Scheme:
    found = _match(schemes, ignore, path, module)
    if found is None or found.weights is None:
        raise BitfoldError(
            f"{folder.path} has codes for {path}, and no group of its quantization config says what they are"
        )
    return found


def _match(schemes: list[Scheme], ignore: tuple[str, ...], path: str, module: nn.Module) -> Scheme | None:
    if any(_means(target, path, module) for target in ignore):
        return None
    named = (scheme for scheme in schemes if any(_means(t, path, module) for t in scheme.targets))
    return next(named, None)


def _means(target: str, path: str, module: nn.Module) -> bool:
    """Whether a target means this layer: its path, a pattern from its start on, or the name of its class."""
    if target.startswith("re:"):
        return re.match(target[3:], path) is not None
    return target == path or any(cls.__name__ == target for cls in type(module).__mro__)


def _check_none_left(
    folder: Folder,
    schemes: list[Scheme],
    ignore: tuple[str, ...],
    model: nn.Module,
    stored: Mapping[str, Stored],
) -> None:
    """A layer that the configuration means and that has no codes is damage, unless its weight is tied."""
    tied = {id(model.get_parameter(path)) for path in stored if _has(model, path)}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or id(weight) in tied:
            continue
        scheme = _match(schemes, ignore, path, module)
        if scheme is not None and scheme.weights is not None:
            raise BitfoldError(
                f"{folder.path}: its quantization config means {path}, and there are no codes for it; copy "
                "the checkpoint again, or add the layer to the config's ignore list"
            )


def _has(model: nn.Module, path: str) -> bool:
    module = submodule_in(model, path.rpartition(".")[0])
    return module is not None and module._parameters.get("weight") is not None


def _weight(scheme: Scheme, found: Mapping[str, Tensor | None]) -> tuple[Quantized, dict[str, Tensor]]:
    scales = found["weight_scale"]
    assert scheme.weights is not None and scales is not None
    if scales.dtype is torch.float8_e8m0fnu:
        scales = scales.view(torch.uint8)
    order = found["weight_g_idx"]
    fmt = weight_format(scheme.weights, scales.dtype)
    if order is not None and not _in_order(order, fmt):
        raise BitfoldError(
            "its groups are permuted (weight_g_idx), and the codes of a group lie side by side"
        )
    codes, k = _codes(fmt, found)
    params: dict[str, Tensor] = {"scales": _shaped(fmt, scales, codes.shape[0], k, "weight_scale")}
    if fmt.scale is not None and fmt.scale.zero == "int":
        params["zeros"] = _zeros(fmt, found, codes.shape[0], k)
    kept = {}
    if fmt.scale is not None and fmt.scale.two_level:
        divisor = found["weight_global_scale"]
        if divisor is None or divisor.numel() != 1:
            raise BitfoldError("NVFP4 weights have one weight_global_scale a layer, which is not here")
        kept["weight_global_scale"] = divisor
        params["tensor_scale"] = 1.0 / divisor.to(torch.float32).reshape(1, 1)
    return Quantized(fmt, k, codes, **params), kept


def _in_order(order: Tensor, fmt: Format) -> bool:
    size = fmt.cols
    return size is not None and torch.equal(order.long(), torch.arange(len(order)) // size)


def _codes(fmt: Format, found: Mapping[str, Tensor | None]) -> tuple[Tensor, int]:
    packed, weight = found["weight_packed"], found["weight"]
    integer = isinstance(fmt.element, Integer)
    if packed is not None and packed.dtype is torch.int32 and integer:
        shape = found["weight_shape"]
        if shape is None or shape.numel() != 2:
            raise BitfoldError("packed codes need a weight_shape of two numbers beside them")
        rows, k = (int(size) for size in shape.reshape(-1))
        words = -(-k * fmt.element.bits // 32)
        if tuple(packed.shape) != (rows, words):
            raise BitfoldError(
                f"weight_packed is {list(packed.shape)} and {rows} x {k} codes of {fmt.element.bits} bits "
                f"take [{rows}, {words}] words"
            )
        return from_words(fmt, packed, k), k
    if packed is not None and packed.dtype is torch.uint8 and not integer:
        # Floats of 4 and 6 bits lie as they do here: a dense stream, the first code in the low bits.
        return packed, packed.shape[-1] * 8 // fmt.element.bits
    wanted = torch.int8 if integer else torch.float8_e4m3fn
    if weight is not None and weight.dtype is wanted:
        codes = weight.view(torch.uint8)
        if fmt.element.bits < 8:  # int4 codes one a byte: the high bits repeat the sign
            codes = fmt.pack(codes & ((1 << fmt.element.bits) - 1))
        return codes, weight.shape[-1]
    held = {name: f"{t.dtype}{list(t.shape)}" for name, t in found.items() if t is not None}
    raise BitfoldError(f"its tensors {held} are not what codes of {fmt} are stored as")


def _zeros(fmt: Format, found: Mapping[str, Tensor | None], rows: int, k: int) -> Tensor:
    zeros = found["weight_zero_point"]
    if zeros is None:
        raise BitfoldError("weights that are not symmetric need a weight_zero_point, which is not here")
    if zeros.dtype is torch.int32:
        zeros = zeros_from_words(fmt, zeros, rows)
    if zeros.dtype is not torch.int8:
        raise BitfoldError(f"zero points are int8 or packed in int32, not {zeros.dtype}")
    return _shaped(fmt, zeros, rows, k, "weight_zero_point")


def _shaped(fmt: Format, part: Tensor, rows: int, k: int, name: str) -> Tensor:
    """A part in the shape that the format has; a scale a tensor comes as [1] or []."""
    fmt.check((rows, k))
    assert fmt.scale is not None
    wanted = fmt.scale.granularity.scales_shape((rows, k))
    squeezed = part.numel() == 1 and len(wanted) == 2 and wanted == (1, 1)
    by_row = tuple(part.shape) == wanted[:1] and wanted[1:] == (1,)
    if tuple(part.shape) != wanted and not squeezed and not by_row:
        raise BitfoldError(f"{name} is {list(part.shape)} and {fmt} of [{rows}, {k}] has {list(wanted)}")
    return part.reshape(wanted)


def _activations(scheme: Scheme, found: Mapping[str, Tensor | None]) -> tuple[str, tuple[Tensor, ...]]:
    if scheme.outputs is not None:
        raise BitfoldError("its outputs are quantized too, which is not read; give activations=False")
    args = scheme.inputs
    if args is None:
        return "", ()
    if args.get("dynamic"):
        return str(activation_format(args, None)), ()
    scale = found["input_scale"]
    if scale is None or scale.numel() != 1:
        raise BitfoldError("static activations need one input_scale, which is not here")
    fmt = activation_format(args, scale.dtype)
    if fmt.scale is None or fmt.scale.zero != "int":
        return str(fmt), (scale,)
    zero = found["input_zero_point"]
    if zero is None or zero.dtype is not torch.int8 or zero.numel() != 1:
        raise BitfoldError("static activations that are not symmetric need one int8 input_zero_point")
    return str(fmt), (scale, zero)
