"""`bf.load`: a saved model into a skeleton, or a saved program alone, for any target.

In: a file of `bf.save`, and for a model a skeleton of the same architecture (on `meta` if you like: only what
is in the file is made). Out: the skeleton, quantized in place, its tensors mapped from the file; or a
GraphModule.

    with torch.device("meta"): skeleton = LlamaForCausalLM(config)
    model = bf.load("model.safetensors", into=skeleton)
    program = bf.load("program.safetensors", target="reference")

Everything is checked before the skeleton is touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import BitfoldError, format
from .folded import Canonical, Folded, original_class
from .graph_data import Data, tensor_names
from .graph_data import load as load_graph
from .graph_values import enum_value
from .install import CANONICAL, Installer, Source, canonical_parts, lower_graph, part_kinds, resolve_target
from .paths import FileError
from .report import ATTRIBUTE
from .save import join
from .tensor_file import TensorFile, open_file


@torch.inference_mode(False)
def load(
    path: str | os.PathLike[str],
    into: nn.Module | None = None,
    *,
    target: str | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """Load what `bf.save` wrote.

    into    the skeleton of a saved model: its architecture, with or without weights; not for a program
    target  where it shall run; by default that of the device
    device  where the tensors go; by default where the skeleton's are, or the CPU for a skeleton on meta

    Returns `into`, or the program as a GraphModule. Raises BitfoldError (a sentence that names the tensor or
    the module) for a file that is damaged, newer than this bitfold, or of another architecture.
    """
    file = open_file(path)
    place = None if device is None else torch.device(device)
    if file.header["kind"] not in ("program", "module"):
        raise FileError(
            f"{file.path} has a damaged bitfold header (kind {file.header['kind']!r}); save the model again"
        )
    if file.header["kind"] == "program":
        if into is not None:
            raise BitfoldError(
                f"{file.path} holds a program, which needs no skeleton; call bf.load(path) alone"
            )
        return _load_program(file, place or torch.device("cpu"), target)
    if into is None:
        raise BitfoldError(
            f"{file.path} holds the weights of a {file.header.get('model', 'model')}; give its skeleton: "
            "bf.load(path, into=model)"
        )
    with _reading_header(file):
        plan = _Plan(file, into, place)
        plan.check()
    plan.write(resolve_target(target, plan.device))
    return into


@contextmanager
def _reading_header(file: TensorFile) -> Iterator[None]:
    """What goes wrong in here is the header's fault, since nothing else has been touched yet: it is data
    that somebody else may have written, so that any error at all may come of it.
    """
    try:
        yield
    except (BitfoldError, OSError, MemoryError):
        raise
    except Exception as error:
        raise FileError(
            f"{file.path} has a damaged bitfold header ({type(error).__name__}: {error}); save the model "
            "again"
        ) from error


def _load_program(file: TensorFile, device: torch.device, target: str | None) -> Any:
    on = resolve_target(target, device)
    made: dict[str, Tensor] = {}
    with _reading_header(file):
        graph, tied = file.header["graph"], file.header["tied"]
        parameters = set(file.header["parameters"])
        names = {name: tied.get(name, name) for name in tensor_names(graph)}
        for name, first in names.items():
            if first not in file:
                raise FileError(f"{file.path} lacks the tensor {name!r} that its program uses; save it again")
        _check_parts(file, canonical_parts(graph), lambda name: tied.get(name, name))
    for first in dict.fromkeys(names.values()):
        tensor = file[first].to(device)
        made[first] = nn.Parameter(tensor, requires_grad=False) if first in parameters else tensor
    with _reading_header(file):
        gm = load_graph(graph, {name: made[first] for name, first in names.items()}, device)
    gm.meta[CANONICAL] = Canonical(graph, {})
    return lower_graph(gm, on)


@dataclass(frozen=True)
class _Fold:
    """One module to fold, read from the header: all that `Installer.install` wants but the tensors."""

    path: str
    names: dict[str, str]
    graph: Data
    sources: dict[str, Source]
    dtype: torch.dtype
    ranks: tuple[int, ...] | None


@dataclass
class _Plan:
    """What goes where, checked against file and skeleton."""

    file: TensorFile
    model: nn.Module
    given_device: torch.device | None

    def __post_init__(self) -> None:
        header = self.file.header
        self.entries: dict[str, Any] = header["modules"]
        self.tied: dict[str, str] = header["tied"]
        self.buffers = set(header["buffers"])
        names = {join(path, name) for path, entry in self.entries.items() for name in entry["names"].values()}
        kept = {*header["tensors"], *self.tied}
        own = {
            join(path, name) for path, entry in self.entries.items() for name in _existing(self.model, path)
        }
        self.parts = names - own
        self.plain = sorted(kept - self.parts)

    @property
    def device(self) -> torch.device:
        if self.given_device is not None:
            return self.given_device
        devices = [parameter.device for parameter in self.model.parameters() if not parameter.is_meta]
        return devices[0] if devices else torch.device("cpu")

    def check(self) -> None:
        for path, entry in self.entries.items():
            self._check_module(path, entry)
        self._check_aliases()
        self._check_plain()
        self._check_covered()
        self._check_graphs()
        self.folds = [self._fold(path, entry) for path, entry in self._once()]

    def _check_module(self, path: str, entry: Mapping[str, Any]) -> None:
        module = _submodule(self.model, path)
        if module is None:
            raise BitfoldError(
                f"{self.file.path} has a module {path!r} that this {type(self.model).__name__} does not have"
            )
        if original_class(module).__name__ != entry["class"]:
            raise BitfoldError(
                f"{path} is a {original_class(module).__name__} here and a {entry['class']} in "
                f"{self.file.path}"
            )
        for weight in entry["weights"]:
            shape = _shape(module, weight["name"])
            if shape is not None and shape != tuple(weight["shape"]):
                raise BitfoldError(
                    f"{join(path, weight['name'])} has shape {list(shape)} here and {weight['shape']} in "
                    f"{self.file.path}; make the skeleton with the configuration of the saved model"
                )
            parts = tuple(join(path, part) for part in weight["parts"])
            _check_parts(
                self.file, [(parts, weight["format"], weight["k"])], lambda name: self.tied.get(name, name)
            )

    def _check_aliases(self) -> None:
        """A module that has two names here must be one in the file."""
        first: dict[nn.Module, tuple[str, dict[str, str]]] = {}
        for path, entry in self.entries.items():
            full = {attribute: join(path, name) for attribute, name in entry["names"].items()}
            tensors = {attribute: self.tied.get(name, name) for attribute, name in full.items()}
            known, its = first.setdefault(self.model.get_submodule(path), (path, tensors))
            if its != tensors:
                raise BitfoldError(
                    f"{known} and {path} are one module here and two in {self.file.path}; make the skeleton "
                    "with the configuration of the saved model"
                )

    def _once(self) -> Iterator[tuple[str, Any]]:
        """The modules of the file, by the first of their names here."""
        first = {self.model.get_submodule(path): path for path in reversed(self.entries)}
        return ((path, self.entries[path]) for path in self.entries if path in set(first.values()))

    def _check_plain(self) -> None:
        for name in self.plain:
            first = self.tied.get(name, name)
            if first not in self.file:
                raise FileError(f"{self.file.path} lacks the tensor {name!r}; save the model again")
            here = _tensor(self.model, name)
            if here is None:
                raise BitfoldError(
                    f"{self.file.path} has a tensor {name!r} that this {type(self.model).__name__} does not "
                    "have"
                )
            if tuple(here.shape) != self.file.shapes[first]:
                raise BitfoldError(
                    f"{name} has shape {list(here.shape)} here and {list(self.file.shapes[first])} in "
                    f"{self.file.path}; make the skeleton with the configuration of the saved model"
                )

    def _check_covered(self) -> None:
        folded = {
            join(path, weight["name"]) for path, entry in self.entries.items() for weight in entry["weights"]
        }
        known = {*self.plain, *folded, *self.parts}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            owner, _, last = name.rpartition(".")
            module = _submodule(self.model, owner)
            if name not in known and not (isinstance(module, Folded) and last in module.parts):
                raise BitfoldError(
                    f"{self.file.path} has no tensor for {name!r} of this {type(self.model).__name__}; "
                    "make the skeleton with the configuration of the saved model"
                )

    def _check_graphs(self) -> None:
        """Each graph is built once on tensors without numbers, from which nothing can run."""
        first = {entry["graph"]: path for path, entry in reversed(self.entries.items())}
        for index, path in first.items():
            tensors: dict[str, Tensor] = {}
            for attribute, name in self.entries[path]["names"].items():
                held = self.tied.get(join(path, name), join(path, name))
                shape, dtype = self.file.shapes[held], self.file.dtypes[held]
                tensors[attribute] = torch.empty(shape, dtype=dtype, device="meta")
            load_graph(self.file.header["graphs"][index], tensors, torch.device("meta"))

    def write(self, target: str) -> None:
        """Put everything in its place."""
        device, made = self.device, dict[str, Tensor]()

        def tensor(name: str) -> Tensor:
            first = self.tied.get(name, name)
            if first not in made:
                made[first] = self.file[first].to(device)
            return made[first]

        parameters: dict[str, nn.Parameter] = {}
        for name in self.plain:
            owner, _, last = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if name in self.buffers:
                module._buffers[last] = tensor(name)
                continue
            first = self.tied.get(name, name)
            if first not in parameters:
                old = module._parameters[last]
                grad = old is not None and old.requires_grad and tensor(name).is_floating_point()
                parameters[first] = nn.Parameter(tensor(name), requires_grad=grad)
            module._parameters[last] = parameters[first]
        installer = Installer(target)
        for fold in self.folds:
            self._install(installer, fold, tensor)
        self.model.__dict__[ATTRIBUTE] = tuple(installer.misses)

    def _fold(self, path: str, entry: Mapping[str, Any]) -> _Fold:
        attributes = {name: attribute for attribute, name in entry["names"].items()}
        return _Fold(
            path,
            dict(entry["names"]),
            self.file.header["graphs"][entry["graph"]],
            {attributes[weight["parts"][0]]: self._source(path, weight) for weight in entry["weights"]},
            enum_value("dtype", entry["dtype"]),
            None if entry["ranks"] is None else tuple(int(rank) for rank in entry["ranks"]),
        )

    def _install(self, installer: Installer, fold: _Fold, tensor: Callable[[str], Tensor]) -> None:
        module = self.model.get_submodule(fold.path)
        if isinstance(module, Folded):
            module.unfold()
        tensors = {attribute: tensor(join(fold.path, name)) for attribute, name in fold.names.items()}
        installer.install(fold.path, module, fold.graph, tensors, fold.sources, fold.dtype, ranks=fold.ranks)

    def _source(self, path: str, weight: Mapping[str, Any]) -> Source:
        back = weight["back"]
        steps = None if back is None else tuple((step, tuple(sizes)) for step, sizes in back)
        codes = join(path, weight["parts"][0])
        return Source(
            weight["name"], tuple(weight["shape"]), weight["path"], steps, self.tied.get(codes, codes)
        )


def _check_parts(file: TensorFile, weights: list[tuple[tuple[str, ...], str, int]], first: Any) -> None:
    """Parts must be what their format makes of some rows of K numbers."""
    for names, text, k in weights:
        fmt = format(text)
        for name in names:
            if first(name) not in file:
                raise FileError(
                    f"{file.path} lacks the tensor {name!r} of a weight in {fmt}; save the model again"
                )
        shape = (*file.shapes[first(names[0])][:-1], k)
        for name, wanted in zip(names, part_kinds(text, shape), strict=True):
            found = file.dtypes[first(name)], file.shapes[first(name)]
            if found != wanted:
                raise FileError(
                    f"{file.path}: tensor {name!r} is {found[0]}{list(found[1])} and {fmt} of {list(shape)} "
                    f"wants {wanted[0]}{list(wanted[1])}; save the model again"
                )


def _existing(model: nn.Module, path: str) -> set[str]:
    """Names of the tensors that a module has besides what folding gave it."""
    module = _submodule(model, path)
    if module is None:
        return set()
    given = set(module.parts) if isinstance(module, Folded) else set()
    return {*module._parameters, *module._buffers} - given


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    owner, _, last = name.rpartition(".")
    module = _submodule(model, owner)
    if module is None:
        return None
    found = module._parameters.get(last)
    return found if found is not None else module._buffers.get(last)


def _shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    if isinstance(module, Folded):
        return next((weight.shape for weight in module.folded_weights if weight.name == name), None)
    found = module._parameters.get(name)
    return None if found is None else tuple(found.shape)
