"""AutoAWQ and GPTQ read: codes that lie by column of the transposed weight, in 32-bit words.

In: a folder with qweight, qzeros and scales [K / g, N] for each layer. Out: a `Checkpoint`.

    AWQ   qweight int32 [K, N/8], eight outputs of one input in a word, in the order 0 2 4 6 1 3 5 7
    GPTQ  qweight int32 [K * bits / 32, N], inputs of one output in a dense stream
    ->    stored["up.weight"] = Stored(Quantized(uint4[g128,f16,zero], ..)), or int4[g128,f16] if every zero
          point is the middle

Where GPTQ's g_idx spreads a group over the row (activation order without static groups), the codes' columns
are put in the order of the groups, and the layer's input with them.

GPTQ's first version stores zero points less one. A stored 15 could then only be 16, which no quantizer
makes, or a -1 that has run into its neighbours when it was packed: that is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ...formats import BitfoldError, Format, Quantized, format
from ...formats.scale import STORED
from ..files.paths import FileError
from ..files.skeleton import submodule_in
from .checkpoint import Checkpoint, Stored
from .folder import Folder
from .words import from_words, zeros_from_words

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where output i of eight lies in a word: the inverse of 0 2 4 6 1 3 5 7."""

_OF_A_WEIGHT = ("qweight", "qzeros", "scales", "g_idx")
_SCALES = {dtype: name for name, dtype in STORED.items()}


@dataclass(frozen=True)
class Packing:
    """What the configuration says. `group` None: one scale a row. `less_one`: zero points are stored so."""

    method: str
    bits: int
    group: int | None
    less_one: bool = False


def read_by_column(folder: Folder, model: nn.Module) -> Checkpoint:
    """Raises BitfoldError, naming the layer, for what cannot be kept as it is."""
    packing = _packing(folder, folder.quantization or _own_file(folder))
    tensors = dict(folder.tensors)
    stored: dict[str, Stored] = {}
    for path in sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        found = {name: tensors.pop(f"{path}.{name}", None) for name in _OF_A_WEIGHT}
        try:
            stored[f"{path}.weight"] = _weight(packing, found)
        except BitfoldError as error:
            raise BitfoldError(f"{folder.path}, layer {path}: {error}") from error
        _drop_empty_bias(model, path, tensors)
    if not stored:
        raise BitfoldError(f"{folder.path} has a quantization config and no layer with a qweight")
    return Checkpoint(str(folder.path), tensors, stored, folder.dtype)


def _own_file(folder: Folder) -> Mapping[str, Any]:
    """Where older programs kept the configuration."""
    for name in ("quantize_config.json", "quant_config.json"):
        try:
            if (folder.path / name).is_file():
                found = json.loads((folder.path / name).read_text(encoding="utf-8"))
                return found if isinstance(found, dict) else {}
        except (OSError, ValueError) as error:
            raise FileError(f"{folder.path / name} cannot be read as JSON ({error})") from error
    return {}


def _packing(folder: Folder, config: Mapping[str, Any]) -> Packing:
    method = str(config.get("quant_method", "gptq"))
    bits = config.get("bits", config.get("w_bit"))
    group = config.get("group_size", config.get("q_group_size", 128))
    key, default = ("version", "gemm") if method == "awq" else ("checkpoint_format", "gptq")
    version = str(config.get(key, default)).lower()
    allowed: dict[str, dict[str, tuple[int, ...]]] = {
        "awq": {"gemm": (4,)},
        "gptq": {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8)},
    }
    if config.get("dynamic"):
        raise BitfoldError(f"{folder.path} packs layers in different ways ('dynamic'), which is not read")
    if bits not in allowed[method].get(version, ()):
        raise BitfoldError(
            f"{folder.path} holds {method} weights of {bits} bits in the layout {version!r}; read are "
            + ", ".join(f"{v!r} of {'/'.join(map(str, b))} bits" for v, b in allowed[method].items())
        )
    if not isinstance(group, int) or (group < 1 and group != -1):
        raise BitfoldError(f"{folder.path}: group_size is {group!r}; it is a number of inputs, or -1 for all")
    return Packing(method, int(bits), None if group == -1 else group, version == "gptq")


def _weight(packing: Packing, found: Mapping[str, Tensor | None]) -> Stored:
    words, zero_words, scales = found["qweight"], found["qzeros"], found["scales"]
    if not _matrix(words, [torch.int32]) or not _matrix(scales, list(_SCALES)):
        raise BitfoldError("it needs an int32 qweight and float scales, each a matrix")
    if zero_words is None and packing.method == "awq":
        raise BitfoldError("it has no qzeros, and AWQ's codes count from them; copy the checkpoint again")
    if zero_words is not None and not _matrix(zero_words, [torch.int32]):
        raise BitfoldError(f"its qzeros are {zero_words.dtype}{list(zero_words.shape)}, not an int32 matrix")
    bits, rows = packing.bits, scales.shape[-1]
    k = words.shape[0] if packing.method == "awq" else words.shape[0] * 32 // bits
    grain = "row" if packing.group is None else f"g{packing.group}"
    unsigned = format(f"uint{bits}[{grain},{_SCALES[scales.dtype]},zero]")
    unsigned.check((rows, k))
    groups = 1 if packing.group is None else k // packing.group
    words_wide = rows * bits // 32
    if tuple(scales.shape) != (groups, rows) or (
        zero_words is not None and tuple(zero_words.shape) != (groups, words_wide)
    ):
        raise BitfoldError(
            f"its scales are {list(scales.shape)} and {rows} x {k} codes in {groups} groups have "
            f"[{groups}, {rows}], zero points [{groups}, {words_wide}]"
        )
    order = _order(packing, found["g_idx"], k)
    zeros = _zeros(packing, unsigned, zero_words, groups, rows)
    middle = 1 << (bits - 1)
    if bool((zeros == middle).all()):
        fmt, params = format(f"int{bits}[{grain},{_SCALES[scales.dtype]}]"), {}
    else:
        fmt, params = unsigned, {"zeros": zeros}
    codes = _codes(packing, fmt, words, k)
    if order is not None:
        codes = fmt.pack(fmt.unpack(codes, k)[:, order].contiguous())
    return Stored(Quantized(fmt, k, codes, scales.mT.contiguous(), **params), order=order)


def _matrix(tensor: Tensor | None, dtypes: list[torch.dtype]) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.ndim == 2 and tensor.dtype in dtypes


def _codes(packing: Packing, fmt: Format, words: Tensor, k: int) -> Tensor:
    if packing.method == "gptq":
        return from_words(fmt, words.mT, k)
    codes = _awq_numbers(words).mT.contiguous()
    middle = 0 if fmt.element.name.startswith("u") else 1 << (packing.bits - 1)
    return fmt.pack(codes ^ middle)


def _zeros(packing: Packing, fmt: Format, words: Tensor | None, groups: int, rows: int) -> Tensor:
    """uint8 [N, groups]."""
    if words is None:
        return torch.full((rows, groups), 1 << (packing.bits - 1), dtype=torch.uint8)
    if packing.method == "awq":
        return _awq_numbers(words).mT.contiguous()
    zeros = zeros_from_words(fmt, words.mT, rows)
    if not packing.less_one:
        return zeros
    top = (1 << packing.bits) - 1
    if bool((zeros == top).any()):
        raise BitfoldError(
            f"a zero point is stored as {top}, which in GPTQ's first version comes of packing a zero of 0 "
            "and has damaged its neighbours; save it with checkpoint_format 'gptq_v2'"
        )
    return zeros + 1


def _awq_numbers(words: Tensor) -> Tensor:
    """int32 [.., N/8] -> uint8 [.., N], outputs in their own order."""
    shifts = torch.tensor([4 * place for place in _AWQ_ORDER], dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(-2).to(torch.uint8)


def _order(packing: Packing, groups: Tensor | None, k: int) -> Tensor | None:
    """Which input each column of codes shall belong to, so that those of a group are neighbours: activation
    order without static groups spreads them over the row. None if they are neighbours.
    """
    if groups is None or packing.group is None:
        return None
    if groups.shape != (k,) or groups.is_floating_point():
        raise BitfoldError(f"its g_idx is {groups.dtype}{list(groups.shape)}, not {k} integers")
    groups = groups.long().cpu()
    if torch.equal(groups, torch.arange(k) // packing.group):
        return None
    counts = torch.bincount(groups.clamp(0, k), minlength=k // packing.group)  # no table past the last group
    if int(groups.min()) < 0 or len(counts) > k // packing.group or not bool((counts == packing.group).all()):
        raise BitfoldError(
            f"its g_idx does not name each of {k // packing.group} groups {packing.group} times, so what "
            "shares a scale is not known; copy the checkpoint again"
        )
    return torch.argsort(groups, stable=True)


def _drop_empty_bias(model: nn.Module, path: str, tensors: dict[str, Tensor]) -> None:
    """Packers write a bias of zeros for a layer that has none."""
    module, bias = submodule_in(model, path), tensors.get(f"{path}.bias")
    missing = module is not None and module._parameters.get("bias") is None
    if missing and bias is not None and not bool(bias.any()):
        del tensors[f"{path}.bias"]
