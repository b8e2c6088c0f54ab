"""A folder as Hugging Face lays it out: config.json and one or several safetensors files.

In: a path. Out: its tensors by name, mapped from the files, and its configuration; and the way back, each
file written beside its place and renamed.

    read_folder("tinyllama")  ->  Folder({"model.norm.weight": .., ..}, {"quantization_config": {..}, ..})
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...formats import BitfoldError
from ..files.paths import FileError, named

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Folder:
    """`tensors` are mapped from the files: reading one costs memory only then."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The part of the configuration that says how the weights are quantized; empty if there is none."""
        for key in ("quantization_config", "compression_config"):
            found = self.config.get(key)
            if isinstance(found, Mapping):
                return found
        return {}

    @property
    def dtype(self) -> torch.dtype | None:
        """What the model computes in, if the configuration says so."""
        text = self.config.get("dtype", self.config.get("torch_dtype"))
        found = getattr(torch, str(text).removeprefix("torch."), None)
        return found if isinstance(found, torch.dtype) else None


def read_folder(given: object) -> Folder:
    """Raises FileError if there is no such folder, or a file of it is missing or damaged."""
    path = named(given)
    if not path.is_dir():
        raise FileError(f"{path} is not a folder" if path.exists() else f"there is no folder {path}")
    config = _json(path / CONFIG) if (path / CONFIG).is_file() else {}
    return Folder(path, _tensors(path), config)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Each tensor from the file that the index names for it; without one, from the only file that has it."""
    listed = _listed(path / INDEX) if (path / INDEX).is_file() else None
    if listed is not None:
        files = sorted(set(listed.values()))
    else:
        files = (
            [WEIGHTS] if (path / WEIGHTS).is_file() else sorted(f.name for f in path.glob("*.safetensors"))
        )
    if not files:
        raise FileError(f"{path} has no safetensors file; give the folder of a saved model")
    found: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for name in files:
        try:
            with safe_open(str(path / name), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (no mapping)
                    if listed is not None and listed.get(key, name) != name:
                        continue
                    if key in found:
                        raise FileError(
                            f"{path} has {key!r} in {where[key]} and in {name}, and nothing says which is "
                            "meant; leave one model's files in the folder"
                        )
                    found[key], where[key] = opened.get_tensor(key), name
        except (SafetensorError, OSError) as error:
            raise FileError(
                f"{path / name} is missing, truncated or no safetensors file ({error}); copy it again"
            ) from error
    lost = [key for key in listed or () if key not in found]
    if listed is not None and lost:
        raise FileError(f"{path / listed[lost[0]]} lacks {lost[0]!r}, which {INDEX} has in it; copy it again")
    return found


def _listed(index: Path) -> dict[str, str]:
    """The index: each tensor's file, all of them files of this folder."""
    listed = _json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise FileError(f"{index} has no weight_map of names and files; copy it again")
    outside = [name for name in listed.values() if Path(name).name != name or name in ("", "..")]
    if outside:
        raise FileError(f"{index} names {outside[0]!r}, which is not a file of this folder")
    return listed


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise FileError(f"{path} holds {type(found).__name__} where an object is expected")
    return found


def write_folder(given: object, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Both files, the configuration last. Raises FileError if the folder cannot be written to."""
    path = named(given)
    if path.exists() and not path.is_dir():
        raise FileError(f"{path} is a file; give the path of a folder")
    if (path / INDEX).exists():
        raise BitfoldError(f"{path} holds a model in several files already; give another folder")
    weights = path / f"{WEIGHTS}.{os.getpid()}.part"
    text = path / f"{CONFIG}.{os.getpid()}.part"
    try:
        path.mkdir(exist_ok=True)
        save_file(_each_its_own(tensors), weights, {"format": "pt"})
        text.write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for one in (weights, text):
            _to_disk(one)
        # Both are there before either is in place: new codes under an old configuration mean other numbers.
        os.replace(weights, path / WEIGHTS)
        os.replace(text, path / CONFIG)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} cannot be written: {error}") from error
    finally:
        for one in (weights, text):
            one.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _each_its_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense tensors on the CPU, a copy for the second name of one: a safetensors file holds none twice."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        storage = dense.untyped_storage().data_ptr()
        found[name] = dense.clone() if storage in seen else dense
        seen.add(storage)
    return found
