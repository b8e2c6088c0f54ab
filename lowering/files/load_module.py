"""A saved model into its skeleton: what goes where is planned and checked, and then written.

In: an open file of a model, and a skeleton: unquantized, or quantized by whatever recipe; with numbers, or on
`meta`. Out: the skeleton, quantized as the file says.

    skeleton: up: Linear f32       file: up.codes, up.scales, norm.weight bf16
    ->        up: FoldedLinear that computes in f32, norm.weight as f32
    skeleton on meta  ->  the same in bf16, as the file has it

Everything is checked before the skeleton is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import BitfoldError, format
from ..folded import Folded, original_class
from ..install import Installer, Source, part_kinds
from ..report import ATTRIBUTE
from ..retype import retyped
from .extra_state import load_state, stateful, tensors_of
from .graph_data import Data
from .graph_data import load as load_graph
from .graph_values import enum_value
from .paths import FileError
from .save import join
from .skeleton import device_for, kind, parameters_in, place_in, submodule_in, tensors_in
from .tensor_file import TensorFile


@dataclass(frozen=True)
class _Layer:
    """One module to fold, read from the header: all that `Installer.install` wants but the tensors."""

    path: str
    names: dict[str, str]
    graph: Data
    sources: dict[str, Source]
    dtype: torch.dtype
    ranks: tuple[int, ...] | None


@dataclass
class ModulePlan:
    """What goes where, checked against file and skeleton."""

    file: TensorFile
    model: nn.Module
    given_device: torch.device | None

    def __post_init__(self) -> None:
        header = self.file.header
        self.entries: dict[str, Any] = header["modules"]
        self.tied: dict[str, str] = header["tied"]
        names = {join(path, name) for path, entry in self.entries.items() for name in entry["names"].values()}
        kept = {*header["tensors"], *self.tied}
        own = {
            join(path, name) for path, entry in self.entries.items() for name in tensors_in(self.model, path)
        }
        self.parts = names - own
        self.states: dict[str, Any] = header.get("extra_state", {})
        self.plain = sorted(
            kept - self.parts - {name for data in self.states.values() for name in tensors_of(data)}
        )

    @property
    def device(self) -> torch.device:
        return device_for(self.model, self.given_device)

    def check(self) -> None:
        for path, entry in self.entries.items():
            self._check_module(path, entry)
        self._check_aliases()
        self._check_plain()
        self._check_covered()
        self._check_unfolded()
        self._check_states()
        self._check_graphs()
        self.layers = [self._layer(path, entry) for path, entry in self._once()]

    def _check_module(self, path: str, entry: Mapping[str, Any]) -> None:
        module = submodule_in(self.model, path)
        if module is None:
            raise BitfoldError(
                f"{self.file.path} has a module {path!r} that this {type(self.model).__name__} does not have"
            )
        if original_class(module).__name__ != entry["class"]:
            raise BitfoldError(
                f"{path or 'the model'} is a {original_class(module).__name__} here and a {entry['class']} "
                f"in {self.file.path}"
            )
        for weight in entry["weights"]:
            here = place_in(self.model, join(path, weight["name"]))
            if here is not None and here.shape != tuple(weight["shape"]):
                raise BitfoldError(
                    f"{join(path, weight['name'])} has shape {list(here.shape)} here and {weight['shape']} "
                    f"in {self.file.path}; make the skeleton with the configuration of the saved model"
                )
            parts = tuple(join(path, part) for part in weight["parts"])
            check_parts(
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
            self._check_tensor(name)
            first = self.tied.get(name, name)
            here = place_in(self.model, name)
            if here is None:
                raise BitfoldError(
                    f"{self.file.path} has a tensor {name!r} that this {type(self.model).__name__} does not "
                    "have"
                )
            if here.shape != self.file.shapes[first]:
                raise BitfoldError(
                    f"{name} has shape {list(here.shape)} here and {list(self.file.shapes[first])} in "
                    f"{self.file.path}; make the skeleton with the configuration of the saved model"
                )
            dtype = self.file.dtypes[first]
            if here.dtype is not None and kind(here.dtype) != kind(dtype):
                raise BitfoldError(
                    f"{name} is {here.dtype} here and {dtype} in {self.file.path}, and numbers of one kind "
                    "are not copied into another; make the skeleton with the configuration of the saved model"
                )

    def _check_covered(self) -> None:
        folded = {
            join(path, weight["name"]) for path, entry in self.entries.items() for weight in entry["weights"]
        }
        known = {*self.plain, *folded, *self.parts}
        # A buffer that the file does not have stays as it is, but one on meta would be left without numbers.
        empty = (name for name, buffer in self.model.named_buffers() if buffer.is_meta)
        for name in (*parameters_in(self.model), *empty):
            if name not in known:
                raise BitfoldError(
                    f"{self.file.path} has no tensor for {name!r} of this {type(self.model).__name__}; "
                    "make the skeleton with the configuration of the saved model"
                )

    def _check_unfolded(self) -> None:
        """A layer that is folded here and not in the file must become what it was before."""
        kept = {self.model.get_submodule(path) for path in self.entries}
        for path, module in self.model.named_modules():
            if isinstance(module, Folded) and module not in kept and module.replaced_forward:
                raise BitfoldError(
                    f"{path} is quantized here and not in {self.file.path}, and quantizing it has replaced "
                    "the forward that was set on it; make the skeleton anew"
                )

    def _check_states(self) -> None:
        """Extra states are there for the modules that have one, and only for them."""
        here = {path for path, _ in stateful(self.model)}
        for path in sorted(here ^ set(self.states)):
            has, lacks = f"this {type(self.model).__name__}", str(self.file.path)
            if path not in here:
                has, lacks = lacks, has
            raise BitfoldError(
                f"{path or 'the model'} has an extra state (get_extra_state) in {has} and none in {lacks}; "
                "make the skeleton of the classes that were saved"
            )
        for data in self.states.values():
            load_state(data, self._check_tensor)

    def _check_tensor(self, name: str) -> Tensor:
        first = self.tied.get(name, name)
        if first not in self.file:
            raise FileError(f"{self.file.path} lacks the tensor {name!r}; save the model again")
        return torch.empty(0)

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

        computing = [self._computing_in(layer) for layer in self.layers]
        here = {name: place_in(self.model, name) for name in self.plain}
        for module in self.model.modules():
            if isinstance(module, Folded):
                module.unfold()
        parameters: dict[tuple[str, torch.dtype], nn.Parameter] = {}
        for name, place in here.items():
            assert place is not None
            owner, _, last = name.rpartition(".")
            module = self.model.get_submodule(owner)
            given = tensor(name).to(place.dtype or tensor(name).dtype)
            if place.buffer:
                module._buffers[last] = given
                continue
            key = self.tied.get(name, name), given.dtype
            if key not in parameters:
                grad = place.requires_grad and given.is_floating_point()
                parameters[key] = nn.Parameter(given, requires_grad=grad)
            module._parameters[last] = parameters[key]
        installer = Installer(target)
        for layer, dtype in zip(self.layers, computing, strict=True):
            self._install(installer, layer, tensor, dtype)
        self.model.__dict__[ATTRIBUTE] = tuple(installer.misses)
        for path, data in self.states.items():
            module = self.model.get_submodule(path)
            original_class(module).set_extra_state(module, load_state(data, tensor))

    def _layer(self, path: str, entry: Mapping[str, Any]) -> _Layer:
        attributes = {name: attribute for attribute, name in entry["names"].items()}
        return _Layer(
            path,
            dict(entry["names"]),
            self.file.header["graphs"][entry["graph"]],
            {attributes[weight["parts"][0]]: self._source(path, weight) for weight in entry["weights"]},
            enum_value("dtype", entry["dtype"]),
            None if entry["ranks"] is None else tuple(int(rank) for rank in entry["ranks"]),
        )

    def _computing_in(self, layer: _Layer) -> torch.dtype:
        """What a folded layer computes in: as the skeleton's does, or as the file says for one on meta."""
        places = (place_in(self.model, join(layer.path, source.name)) for source in layer.sources.values())
        dtypes = (place.dtype for place in places if place is not None)
        return next((dtype for dtype in dtypes if dtype is not None), layer.dtype)

    def _install(
        self, installer: Installer, layer: _Layer, tensor: Callable[[str], Tensor], dtype: torch.dtype
    ) -> None:
        """Lower for the dtype that the layer will compute in: a target may take one and not another."""
        path, graph, tensors = layer.path, layer.graph, dict[str, Tensor]()
        for attribute, name in layer.names.items():
            full = join(path, name)
            given = tensor(full)
            # A bias, say, goes with the layer's numbers; codes, scales and ranges are what they are.
            moves = full not in self.parts and given.dtype == layer.dtype
            tensors[attribute] = given.to(dtype) if moves else given
        if dtype != layer.dtype and dtype.is_floating_point:
            graph = retyped(graph, layer.dtype, dtype)
        module = self.model.get_submodule(path)
        installer.install(path, module, graph, tensors, layer.sources, dtype, ranks=layer.ranks)

    def _source(self, path: str, weight: Mapping[str, Any]) -> Source:
        back = weight["back"]
        steps = None if back is None else tuple((step, tuple(sizes)) for step, sizes in back)
        codes = join(path, weight["parts"][0])
        return Source(
            weight["name"], tuple(weight["shape"]), weight["path"], steps, self.tied.get(codes, codes)
        )


def check_parts(file: TensorFile, weights: list[tuple[tuple[str, ...], str, int]], first: Any) -> None:
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
