"""A safetensors file: written one tensor at a time beside its place and renamed, read through a memory map.

In: named tensors and a header of JSON data. Out: a file that safetensors itself reads; and from a file, its
header and its tensors, checked before one of them is touched.

    write(path, {"head.codes": codes}, {"version": 1, ...});  open_file(path).header["version"]

The header lies in safetensors' metadata under the key `bitfold`. Tensors go out from where they are, so
writing takes no second copy of the model; an interrupted write leaves what was at `path` before.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...passes.core import Progress
from .paths import FileError, is_file, named, place_of

VERSION = 1
"""Of the header. Raised when an older bitfold would misread the file."""

KEY = "bitfold"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorFile:
    """An open file: its header, what it says of each tensor, and the tensors, mapped on demand."""

    path: Path
    header: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    _open: Mapping[str, Any] = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open[name].get_tensor(name)
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self.shapes


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | Callable[[], Tensor]],
    header: dict[str, Any],
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    progress: Progress | None = None,
) -> None:
    """Write `tensors` (or what makes each, called when its turn has come) and `header` to `path`.

    `shapes` gives dtype and shape of each ahead. Raises FileError for a place that cannot be written, and for
    a dtype that safetensors does not have.
    """
    place = place_of(path)
    for name, (dtype, _) in shapes.items():
        if dtype not in _NAMES:
            raise FileError(f"tensor {name!r} is {dtype}, which a safetensors file does not hold")
    # Larger items first keeps every tensor aligned to its own size in the map.
    order = sorted(shapes, key=lambda name: -shapes[name][0].itemsize)
    # Short, since the place's own name may be as long as the system allows.
    beside = place.with_name(f"{place.name[:40]}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with open(beside, "wb") as out:
            out.write(_head(order, shapes, header))
            for done, name in enumerate(order):
                given = tensors[name]
                _write_tensor(out, given if isinstance(given, Tensor) else given(), name, shapes[name])
                if progress is not None:
                    progress(f"write {name}", done, len(order))
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, place)
    except OSError as error:
        raise FileError(
            f"{place} cannot be written: {error.strerror or error}; what was there is as it was"
        ) from error
    finally:
        if beside.exists():
            beside.unlink()


def open_file(path: str | os.PathLike[str], *more: str | os.PathLike[str]) -> TensorFile:
    """Open what `write` wrote, or several files of one model, each of which has the whole header.

    Raises FileError for no file, a truncated one, one of another program or of a newer bitfold, and one that
    lacks a tensor.
    """
    places = [named(one) for one in (path, *more)]
    header: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for place in places:
        opened, header = _opened(place)
        for name in opened.keys():  # noqa: SIM118  (no mapping)
            part = opened.get_slice(name)
            tensors[name], shapes[name] = opened, tuple(part.get_shape())
            dtypes[name] = DTYPES.get(part.get_dtype(), torch.float32)
    place = places[0]
    for name, dtype, shape in _listed(place, header):
        if name not in shapes:
            raise FileError(f"{place} lacks the tensor {name!r} that its header names; save the model again")
        if shapes[name] != shape or _NAMES[dtypes[name]] != dtype:
            raise FileError(
                f"{place}: tensor {name!r} is {_NAMES[dtypes[name]]}{list(shapes[name])} but its header says "
                f"{dtype}{list(shape)}; save the model again"
            )
    return TensorFile(place, header, shapes, dtypes, tensors)


def _opened(place: Path) -> tuple[Any, dict[str, Any]]:
    """One file, and its header."""
    if not is_file(place):
        raise FileError(f"{place} is not a file" if place.exists() else f"there is no file {place}")
    try:
        opened: Any = safe_open(str(place), framework="pt")
        header = _header(place, opened.metadata() or {})
        for name in opened.keys():  # noqa: SIM118  (no mapping)
            opened.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{place} is truncated or is not a safetensors file ({error}); copy or save it again"
        ) from error
    return opened, header


def _listed(place: Path, header: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor that the header names."""
    try:
        return [(name, dtype, tuple(shape)) for name, (dtype, shape) in header["tensors"].items()]
    except (TypeError, ValueError, AttributeError) as error:
        raise FileError(
            f"{place} has a damaged bitfold header (tensors: {error}); save the model again"
        ) from error


def described(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Any]:
    """The header's own list of what must be in the file."""
    return {name: [_NAMES.get(dtype, str(dtype)), list(shape)] for name, (dtype, shape) in shapes.items()}


def _header(place: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if KEY not in metadata:
        raise FileError(
            f"{place} is a safetensors file but was not saved by bitfold; quantize and bf.save its model"
        )
    try:
        header = json.loads(metadata[KEY])
        version = int(header["version"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise FileError(f"{place} has a damaged bitfold header ({error}); save the model again") from error
    if version > VERSION:
        raise FileError(
            f"{place} was saved by a newer bitfold ({header.get('bitfold', 'unknown')}, file version "
            f"{version}) and this one reads up to version {VERSION}; upgrade bitfold"
        )
    missing = [key for key in ("kind", "tensors") if key not in header]
    if missing:
        raise FileError(f"{place} has a damaged bitfold header (no {missing[0]!r}); save the model again")
    return dict(header)


def _head(
    order: list[str], shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], header: dict[str, Any]
) -> bytes:
    entries: dict[str, Any] = {
        "__metadata__": {"format": "pt", KEY: json.dumps(header, separators=(",", ":"))}
    }
    at = 0
    for name in order:
        dtype, shape = shapes[name]
        end = at + dtype.itemsize * _numel(shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(out: Any, tensor: Tensor, name: str, expected: tuple[torch.dtype, tuple[int, ...]]) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != expected:
        raise RuntimeError(f"tensor {name!r} is {tensor.dtype}{list(tensor.shape)}, expected {expected}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        out.write(flat.view(torch.uint8).numpy().data)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
