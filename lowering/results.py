"""What an algorithm has found so far, on disk: an interrupted run goes on where it stopped.

In: a folder, and what the run is about (model, recipe, algorithm, data). Out: a file a layer, written beside
its place and renamed, and read again by the next run of the same.

    bf.quantize(model, "int4", algorithm="gptq", calibration=batches, resume="out/gptq")
        out/gptq/run.json                    fingerprint of model, recipe, algorithm and data
        out/gptq/model.layers.0.mlp.up_proj.safetensors

A folder that holds another run's results is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..formats import BitfoldError, Quantized, format
from ..passes.draft import DRAFT
from ..passes.note import annotated
from .calibration import Batch
from .module_scope import Site
from .paths import FileError
from .tensor_file import described, open_file, write

_NUMBERS = 4096
"""How many numbers of each tensor go into the fingerprint, evenly spread."""


class Results:
    """A folder of codes, layer by layer."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self.folder = Path(folder)
        about = self.folder / "run.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if about.exists():
                known = json.loads(about.read_text(encoding="utf-8")).get("fingerprint")
                if known != fingerprint:
                    raise FileError(
                        f"{self.folder} holds the results of another model, recipe, algorithm or data; give "
                        "an empty folder"
                    )
                return
            beside = about.with_name(f"run.json.{os.getpid()}.part")
            beside.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
            beside.replace(about)
        except (OSError, ValueError) as error:
            if isinstance(error, BitfoldError):
                raise
            raise FileError(f"{self.folder} cannot hold results: {error}") from error

    def restore(self, site: Site) -> bool:
        """Put the codes that an earlier run found on the site's anchors; False if there are none."""
        path = self._path(site)
        if not path.exists():
            return False
        file = open_file(path)
        for index, (node, note) in enumerate(annotated(site.gm)):
            text = file.header["formats"][index]
            if not text:
                continue
            fmt = format(text)
            if text != note.weight:
                raise FileError(
                    f"{path} holds {text} and the recipe says {note.weight}; give an empty folder"
                )
            parts = [file[f"{index}.{part}"].clone() for part in fmt.parts]
            device = node.meta["val"].device
            codes = Quantized.from_parts(fmt, [part.to(device) for part in parts], file.header["k"][index])
            node.meta[DRAFT] = codes
        return True

    def keep(self, site: Site) -> None:
        """Write the site's codes."""
        tensors: dict[str, Tensor] = {}
        formats, ks = [], []
        for index, (node, _) in enumerate(annotated(site.gm)):
            codes = node.meta.get(DRAFT)
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
        write(self._path(site), tensors, header, shapes)

    def _path(self, site: Site) -> Path:
        name = site.path or "model"
        if len(name) > 150:
            name = name[:100] + hashlib.sha256(name.encode()).hexdigest()[:16]
        return self.folder / f"{name}.safetensors"


def fingerprint(model: nn.Module, texts: Iterable[str], batches: Iterable[Batch]) -> str:
    """A hash of everything that decides the codes; of large tensors, of a sample of their numbers."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode() + b"\0")
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        _update(found, parameter)
    for batch in batches:
        for leaf in pytree.tree_leaves((batch.args, batch.kwargs)):
            if isinstance(leaf, Tensor):
                _update(found, leaf)
            else:
                found.update(repr(leaf).encode())
    return found.hexdigest()


def _update(found: hashlib._Hash, tensor: Tensor) -> None:
    flat = tensor.detach().reshape(-1)
    step = max(flat.numel() // _NUMBERS, 1)
    sample = flat[::step].contiguous().cpu()
    found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    if sample.numel():
        found.update(sample.view(torch.uint8).numpy().tobytes())
