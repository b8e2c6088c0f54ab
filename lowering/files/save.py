"""`bf.save`: a quantized model, or a lowered program, into one safetensors file.

In: a model after `bf.quantize`, a program, or a GraphModule that is folded. Out: a file with every tensor of
it, codes in their canonical layout whatever target it ran on, and a header that says what they are.

    bf.save(model, "model.safetensors")
    header: {"version": 1, "kind": "module", "graphs": [..], "modules": {"layers.0.fc": {"graph": 0, ..}, ..}}

The header holds graphs as data (`graph_data`), once for all layers that are alike: no pickle, and no code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

from ..._version import __version__
from ...formats import BitfoldError, Quantized, format
from ...passes import Stage, state
from ...passes.core import Progress
from ...passes.stages import find_attribute
from ..folded import Folded, original_class
from ..folded_weight import Canonical, FoldedWeight
from ..given_model import is_graph, module_of
from ..install import CANONICAL, Kind, canonical_parts, part_kinds, weight_parts
from .extra_state import dump_states
from .graph_data import dump, tensor_names
from .paths import place_of
from .tensor_file import VERSION, described, write

Make = Tensor | Callable[[], Tensor]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> None:
    """Write `model` to `path`. Raises BitfoldError if it is not quantized, or the file cannot be written.

    The file appears whole or not at all; what was at `path` before stays until then.
    """
    place, model = place_of(path), module_of(model, "bf.save")
    contents, header = contents_of(model)
    write(place, contents.tensors, header, contents.kinds, progress)


def contents_of(model: nn.Module) -> tuple[Contents, dict[str, Any]]:
    """The tensors of the file that `save` writes, and its header."""
    contents = Contents()
    header = _program(model, contents) if is_graph(model) else _module(model, contents)
    header = {"version": VERSION, "bitfold": __version__, **header}
    return contents, header | {"tensors": described(contents.kinds), "tied": contents.tied}


class Contents:
    """The tensors of the file: each once, whatever names it has."""

    def __init__(self) -> None:
        self.tensors: dict[str, Make] = {}
        self.kinds: dict[str, Kind] = {}
        self.tied: dict[str, str] = {}
        self._first: dict[int, str] = {}

    def add(self, name: str, tensor: Tensor, made: tuple[Kind, Callable[[], Tensor]] | None = None) -> None:
        """Put `tensor` in the file; `made` says what is written in its place."""
        if isinstance(tensor, DTensor):
            raise BitfoldError(f"{name} is sharded over several processes; save the model before fully_shard")
        if tensor.is_meta:
            raise BitfoldError(f"{name} is on the meta device and has no numbers to save")
        if id(tensor) in self._first:
            self.tied[name] = self._first[id(tensor)]
            return
        self._first[id(tensor)] = name
        self.kinds[name], self.tensors[name] = made or ((tensor.dtype, tuple(tensor.shape)), tensor)


def _module(model: nn.Module, contents: Contents) -> dict[str, Any]:
    # A module under two names is in the file under both, as its tensors are.
    every = model.named_modules(remove_duplicate=False)
    folded = {path: module for path, module in every if isinstance(module, Folded)}
    prepared = [path for path, module in model.named_modules() if getattr(module, "is_prepared", False)]
    if folded and prepared:
        raise BitfoldError(
            f"bf.convert was stopped midway: {prepared[0]} is prepared for training still; call it again"
        )
    if not folded:
        if prepared:
            raise BitfoldError(
                "this model is prepared for training and holds no codes yet; save model.state_dict() to "
                "go on training, or call bf.convert first"
            )
        raise BitfoldError(
            f"nothing in this {type(model).__name__} is quantized; call bf.quantize first (or save it by "
            "torch's means)"
        )
    graphs: dict[str, int] = {}
    modules: dict[str, Any] = {}
    relaid: dict[str, tuple[Kind, Callable[[], Tensor]]] = {}
    for path, module in folded.items():
        text = json.dumps(module.canonical.graph)
        modules[path] = _entry(module, graphs.setdefault(text, len(graphs)))
        for weight in module.folded_weights:
            names = [join(path, part) for part in weight.parts]
            relaid |= _in_canonical(module.quantized(weight), weight.canonical, names)
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        contents.add(name, tensor, relaid.get(name))
    states = dump_states(model, contents.add)
    return {
        "kind": "module",
        "model": type(model).__name__,
        "graphs": [json.loads(text) for text in graphs],
        "modules": modules,
        **({"extra_state": states} if states else {}),
    }


def _entry(module: Folded, graph: int) -> dict[str, Any]:
    return {
        "class": original_class(module).__name__,
        "graph": graph,
        "dtype": str(module.compute_dtype).removeprefix("torch."),
        "names": module.canonical.names,
        "ranks": module.canonical.ranks,
        "weights": [_weight(weight) for weight in module.folded_weights],
    }


def _weight(weight: FoldedWeight) -> dict[str, Any]:
    return {
        "name": weight.name,
        "shape": list(weight.shape),
        "path": weight.path,
        "format": weight.canonical,
        "k": weight.k,
        "parts": list(weight.parts),
        "back": None if weight.back is None else [[step, list(sizes)] for step, sizes in weight.back],
    }


def _in_canonical(
    held: Quantized, canonical: str, names: Sequence[str]
) -> dict[str, tuple[Kind, Callable[[], Tensor]]]:
    """By name, how the parts look in the file and what makes them; nothing if they lie that way."""
    if str(held.format) == canonical:
        return {}
    wanted = held.format.with_layout(format(canonical).layout)
    kinds = part_kinds(canonical, (*held.codes.shape[:-1], held.k))

    def part(index: int) -> Tensor:
        if index == 0:
            return held.format.relayout(held, wanted.layout).codes
        name = wanted.parts[index]
        return wanted.turned(name, getattr(held, name)).contiguous()

    return {name: (kinds[i], partial(part, i)) for i, name in enumerate(names)}


def _program(gm: GraphModule, contents: Contents) -> dict[str, Any]:
    canonical = gm.meta.get(CANONICAL)
    if not isinstance(canonical, Canonical):
        if state(gm).stage is not Stage.folded:
            raise BitfoldError(
                f"this graph is {state(gm).stage.name}; save a folded graph (after the pass `fold`), or what "
                "bf.quantize(scope='program') returns"
            )
        canonical = Canonical(dump(gm), {})
    relaid: dict[str, tuple[Kind, Callable[[], Tensor]]] = {}
    files = {parts: text for parts, text, _ in canonical_parts(canonical.graph)}
    for parts, text, k in weight_parts(gm):
        held = Quantized.from_parts(format(text), [find_attribute(gm, part) for part in parts], k)
        relaid |= _in_canonical(held, files.get(parts, text), parts)
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    for name in tensor_names(canonical.graph):
        tensor = find_attribute(gm, name)
        if not isinstance(tensor, Tensor):
            raise BitfoldError(
                f"the lowered graph no longer has {name!r}; save the graph before it is lowered"
            )
        contents.add(name, tensor, relaid.get(name))
    names = tensor_names(canonical.graph)
    return {
        "kind": "program",
        "graph": canonical.graph,
        "parameters": [name for name in names if name in parameters],
    }


def join(*parts: str) -> str:
    """A dotted path of those parts that are not empty."""
    return ".".join(part for part in parts if part)
