"""A GGUF file read: its blocks as codes and scales, its names as transformers has them.

In: a file of llama.cpp (architectures llama, qwen2, qwen3), and a skeleton of transformers' classes. Out: a
`Checkpoint`.

    blk.0.attn_q.weight Q4_0 [N, K/32 * 18 bytes]
    ->  stored["model.layers.0.self_attn.q_proj.weight"] = Stored(Quantized(q4_0, ..)), its rows reordered

A skeleton on meta computes in float32, in which such a file has its norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...formats import BitfoldError, Quantized
from .checkpoint import Checkpoint, Stored
from .gguf_blocks import read_blocks

ROTATED_IN_PAIRS = {"llama": True, "qwen2": False, "qwen3": False}
"""Architectures that are read: whether rows of q and k are reordered for a rotation of neighbouring pairs."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COMPUTED = ("rope_freqs.weight",)


@dataclass(frozen=True)
class GGUF:
    """An open file, memory-mapped: its architecture and its reader."""

    path: Path
    architecture: str
    reader: Any

    def field(self, name: str) -> Any:
        """A metadata field's value. Raises BitfoldError if the file has none of this name."""
        found = self.reader.get_field(name)
        if found is None:
            raise BitfoldError(f"{self.path} has no field {name!r}, which a model needs; get the file again")
        return found.contents()

    def own(self, name: str) -> Any:
        """A field of the architecture: `own("block_count")` is `llama.block_count`."""
        return self.field(f"{self.architecture}.{name}")

    @property
    def names(self) -> Names:
        return Names.of(self.architecture, int(self.own("block_count")))

    def tensors(self) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Every tensor under the file's own name, in the file's own order of rows."""
        for tensor in self.reader.tensors:
            yield tensor.name, _tensor(tensor)


@dataclass(frozen=True)
class Names:
    """transformers' names and the file's, by gguf's own table."""

    table: Any

    @classmethod
    def of(cls, architecture: str, blocks: int) -> Names:
        gguf = gguf_package()
        if architecture not in ROTATED_IN_PAIRS:
            raise BitfoldError(
                f"the file holds a model of architecture {architecture!r}; {', '.join(ROTATED_IN_PAIRS)} are "
                "read"
            )
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        return cls(gguf.get_tensor_name_map(kind, blocks))

    def of_parameter(self, path: str) -> str | None:
        """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
        found: str | None = self.table.get_name(path, try_suffixes=(".weight", ".bias"))
        return found


def gguf_package() -> Any:
    """The package of llama.cpp that knows the file. Raises BitfoldError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise BitfoldError(
            "GGUF files are read and written by gguf: run `pip install 'bitfold[hf]'`"
        ) from error
    return gguf


def open_gguf(path: Path) -> GGUF:
    """Raises BitfoldError for a file that is no GGUF file, or a truncated one."""
    gguf = gguf_package()
    if not path.is_file():
        raise BitfoldError(f"there is no GGUF file {path}")
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, IndexError, KeyError) as error:
        raise BitfoldError(
            f"{path} is truncated or is not a GGUF file ({error}); copy or download it again"
        ) from error
    field = reader.get_field("general.architecture")
    return GGUF(path, "" if field is None else str(field.contents()), reader)


def read_gguf(path: Path, model: nn.Module) -> Checkpoint:
    """Raises BitfoldError for a type or an architecture that is not read, and for names without a place."""
    file = open_gguf(path)
    names, tensors = file.names, dict(file.tensors())
    plain: dict[str, Tensor] = {}
    stored: dict[str, Stored] = {}
    used: set[str] = set()
    for path_here, _ in model.named_parameters(remove_duplicate=False):
        name = names.of_parameter(path_here)
        if name is None or name not in tensors:
            continue
        used.add(name)
        held = in_our_order(tensors[name], heads_of(name, file))
        if isinstance(held, Quantized):
            stored[path_here] = Stored(held)
        else:
            plain[path_here] = held
    left = sorted(set(tensors) - used - set(_COMPUTED))
    if left:
        raise BitfoldError(
            f"{file.path} has a tensor {left[0]!r} ({len(left)} in all) that no parameter of this "
            f"{type(model).__name__} stands for; make the skeleton with the configuration of that model"
        )
    unused = {name: "it follows from the configuration" for name in _COMPUTED if name in tensors}
    return Checkpoint(str(file.path), plain, stored, torch.float32, unused)


def _tensor(tensor: Any) -> Tensor | Quantized:
    kind = tensor.tensor_type.name
    data = torch.from_numpy(np.array(tensor.data))  # a copy: the file is mapped read-only
    if kind not in _FLOATS:
        try:
            return read_blocks(kind, data)
        except BitfoldError as error:
            raise BitfoldError(f"tensor {tensor.name}: {error}") from error
    return data if data.dtype is _FLOATS[kind] else data.view(_FLOATS[kind])


def heads_of(name: str, file: GGUF) -> int | None:
    """The heads whose rows the file has in another order, for q and k; None for every other tensor."""
    if not ROTATED_IN_PAIRS[file.architecture]:
        return None
    stem = name.rpartition(".")[0]
    if stem.endswith(".attn_q"):
        return int(file.own("attention.head_count"))
    return int(file.own("attention.head_count_kv")) if stem.endswith(".attn_k") else None


def in_our_order(held: Tensor | Quantized, heads: int | None) -> Tensor | Quantized:
    """Rows as transformers has them: all parts of a row move with it."""
    if heads is None:
        return held
    if isinstance(held, Tensor):
        return unpermute_rows(held, heads)
    return _rows_moved(held, heads, unpermute_rows)


def in_their_order(held: Tensor | Quantized, heads: int | None) -> Tensor | Quantized:
    """Rows as llama.cpp has them."""
    if heads is None:
        return held
    if isinstance(held, Tensor):
        return permute_rows(held, heads)
    return _rows_moved(held, heads, permute_rows)


def _rows_moved(q: Quantized, heads: int, move: Any) -> Quantized:
    parts = {name: move(getattr(q, name), heads) for name in q.format.parts}
    return Quantized(q.format, q.k, **parts)


def unpermute_rows(x: Tensor, heads: int) -> Tensor:
    """llama.cpp's row order of q and k -> transformers'.

    llama.cpp rotates neighbouring rows of a head (2i, 2i + 1), transformers rows i and i + d/2; so the
    file has row i and row i + d/2 of each head side by side."""
    rows = x.shape[0]
    return x.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(x.shape).contiguous()


def permute_rows(x: Tensor, heads: int) -> Tensor:
    """transformers' row order of q and k -> llama.cpp's."""
    rows = x.shape[0]
    return x.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(x.shape).contiguous()
