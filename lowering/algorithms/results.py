"""What an algorithm has found so far, on disk: an interrupted run goes on where it stopped.

In: a folder, and what the run is about (model, recipe, algorithm, data). Out: a file a layer, written beside
its place and renamed, and read again by the next run of the same.

    bf.quantize(model, "int4", algorithm="gptq", calibration=batches, resume="out/gptq")
        out/gptq/run.json                    fingerprint of model, recipe, algorithm and data
        out/gptq/model.layers.0.mlp.up_proj.safetensors

A folder that holds another run's results is refused, and so is a file of it that comes from elsewhere. Codes
of a weight that was balanced to other numbers than it is now (sums differ in the last bit on another machine)
are found again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..._version import __version__
from ...formats import BitfoldError, Quantized, format
from ...passes.algorithms.draft import DRAFT, Draft
from ...passes.note import annotated
from ...passes.observing.batch import Batch
from ..files.paths import FileError
from ..files.tensor_file import TensorFile, described, open_file, write
from ..module_scope import Site
from .described import described_module


class Results:
    """A folder of codes, layer by layer."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self.folder, self.fingerprint = Path(folder), fingerprint
        about = self.folder / "run.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if about.exists():
                self._check(about, json.loads(about.read_text(encoding="utf-8")))
                return
            beside = about.with_name(f"run.json.{os.getpid()}.part")
            beside.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
            beside.replace(about)
        except (OSError, ValueError) as error:
            if isinstance(error, BitfoldError):
                raise
            raise FileError(f"{self.folder} cannot hold results: {error}") from error

    def _check(self, path: Path, header: Any) -> None:
        known = header.get("fingerprint") if isinstance(header, dict) else None
        if known != self.fingerprint:
            raise FileError(
                f"{path} is of another model, recipe, algorithm, data or version; give an empty folder"
            )

    def holds(self, site: Site) -> bool:
        """Whether `restore` would find codes."""
        return self._found(site) is not None

    def restore(self, site: Site) -> bool:
        """Put the codes that an earlier run found on the site's anchors; False if there are none."""
        weights = [(node, note) for node, note in annotated(site.gm) if note.weight]
        if all(isinstance(node.meta.get(DRAFT), Quantized) for node, _ in weights):
            return True
        found = self._found(site)
        if found is None:
            return False
        for (node, _), codes in zip(annotated(site.gm), found, strict=True):
            if codes is not None:
                parts = [part.to(node.meta["val"].device) for part in codes.parts]
                node.meta[DRAFT] = Quantized.from_parts(codes.format, parts, codes.k)
        return True

    def _found(self, site: Site) -> list[Quantized | None] | None:
        """What the site's file has for each of its anchors; None if there is none, or of other weights."""
        path = self._path(site)
        if not path.exists():
            return None
        file = open_file(path)
        self._check(path, file.header)
        try:
            if file.header["layer"] != site.path:
                raise ValueError(f"it is of {file.header['layer']}")
            if file.header["drafts"] != drafts_of(site):
                return None
            here = list(annotated(site.gm))
            found = [_codes_in(file, index) for index in range(len(here))]
            for (_, note), codes in zip(here, found, strict=True):
                if codes is not None and str(codes.format) != note.weight:
                    raise ValueError(f"it has {codes.format} where the recipe says {note.weight}")
            if file.header["sum"] != _sum(found):
                raise ValueError("its codes are not those that were written")
        except (KeyError, IndexError, TypeError, ValueError, BitfoldError) as error:
            raise FileError(f"{path} is damaged ({error}); remove it") from error
        return found

    def keep(self, site: Site, drafts: list[str]) -> None:
        """Write the site's codes. `drafts`: what `drafts_of` said of it before it was solved."""
        tensors: dict[str, Tensor] = {}
        formats, ks = [], []
        decided = [node.meta.get(DRAFT) for node, _ in annotated(site.gm)]
        for index, codes in enumerate(decided):
            if not isinstance(codes, Quantized):
                formats.append("")
                ks.append(0)
                continue
            formats.append(str(codes.format))
            ks.append(codes.k)
            names = [f"{index}.{part}" for part in codes.format.parts]
            tensors |= dict(zip(names, codes.parts, strict=True))
        shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        header = {"version": 1, "kind": "result", "tensors": described(shapes), "formats": formats, "k": ks}
        header |= {
            "fingerprint": self.fingerprint,
            "layer": site.path,
            "drafts": drafts,
            "sum": _sum(decided),
        }
        write(self._path(site), tensors, header, shapes)

    def _path(self, site: Site) -> Path:
        name = quote(site.path or "model", safe="")  # a module's name may have a slash in it
        if len(name) > 150:
            name = name[:100] + hashlib.sha256(name.encode()).hexdigest()[:16]
        return self.folder / f"{name}.safetensors"


def drafts_of(site: Site) -> list[str]:
    """A hash of each weight that was changed before its codes are decided; "" for one as the model has it."""
    drafts = [node.meta.get(DRAFT) for node, _ in annotated(site.gm)]
    return [_hash(draft.weight) if isinstance(draft, Draft) else "" for draft in drafts]


def fingerprint(model: nn.Module, texts: Iterable[str], batches: Iterable[Batch]) -> str:
    """A hash of everything that decides the codes: every number of the model and of the data, what its
    modules are and the plain values that they hold."""
    found = hashlib.sha256(__version__.encode() + b"\0")
    for text in texts:
        found.update(text.encode() + b"\0")
    for path, module in model.named_modules(remove_duplicate=False):
        found.update(f"{path} {described_module(module)}".encode() + b"\0")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.update(f"{path}.{name}".encode())
                _update(found, tensor)
    found.update(_without_places(str(getattr(model, "config", ""))).encode() + b"\0")
    for batch in batches:
        leaves, spec = pytree.tree_flatten((batch.args, batch.kwargs))
        found.update(str(spec).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                _update(found, leaf)
            else:
                found.update(_without_places(repr(leaf)).encode() + b"\0")
    return found.hexdigest()


def _codes_in(file: TensorFile, index: int) -> Quantized | None:
    text = file.header["formats"][index]
    if not text:
        return None
    fmt = format(text)
    parts = [file[f"{index}.{part}"].clone() for part in fmt.parts]
    return Quantized.from_parts(fmt, parts, int(file.header["k"][index]))


def _without_places(text: str) -> str:
    """Where an object lies in memory is another place in every run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _sum(codes: Iterable[Any]) -> str:
    """A hash of the codes and scales of a layer's weights."""
    found = hashlib.sha256()
    for one in codes:
        for part in one.parts if isinstance(one, Quantized) else ():
            _update(found, part)
    return found.hexdigest()


def _hash(tensor: Tensor) -> str:
    found = hashlib.sha256()
    _update(found, tensor)
    return found.hexdigest()


def _update(found: hashlib._Hash, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    if flat.numel():
        found.update(flat.view(torch.uint8).numpy().data)
