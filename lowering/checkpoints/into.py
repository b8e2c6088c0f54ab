"""A checkpoint into its skeleton: checked against it, then written, module by module.

In: a `Checkpoint` and a model of the same architecture, with numbers or on meta. Out: the model, its plain
tensors in place and its quantized layers folded with the checkpoint's own codes.

    checkpoint: up.weight int4[g128], norm.weight bf16     skeleton: up: Linear, norm: RMSNorm
    ->          up: FoldedLinear(codes, scales), norm.weight

A quantized weight is put in as a parameter of one number in all its places first, which holds its own place
while the layers are captured. Whatever fails before folding leaves the skeleton as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...formats import BitfoldError, nearest
from ...passes import MissRecord, Pipeline, add_constant, call
from ...passes.anchors import TARGETS
from ...passes.note import annotated
from ...passes.observe import Observe
from ...passes.observers import Given, Observer
from ...passes.recipes import Recipe
from ...passes.rules import STORED, Rule
from ..fold_sites import fold_sites
from ..folded import Folded
from ..install import resolve_target
from ..module_scope import Plan, Site, plan
from ..parameters import parameter_names
from ..skeleton import kind, submodule_in
from .buffers import compute_buffers, computed_buffers
from .checkpoint import Checkpoint, Stored

KEPT = "bitfold_kept"
"""On a folded module: what the checkpoint said of it that no part of the codes says (`Stored.kept`)."""

_GIVEN = "minmax"
"""An observer's name that marks an edge as static; what stands there is a `Given`."""


def put(checkpoint: Checkpoint, model: nn.Module, *, target: str | None, device: torch.device | None) -> None:
    """Fold the checkpoint into `model`, in place. Raises BitfoldError, with the model as it was."""
    place = _Placement(checkpoint, model, device)
    place.check()
    on = resolve_target(target, place.device)
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        place.write()
        found = plan(model, _recipe(place), stored={p: s.weight for p, s in place.stored.items()})
        _check_all_fold(place, found)
        for site in found.sites:
            _give_ranges(site, place.stored)
            _reorder(site, place.stored)
    except BaseException:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        raise
    found.misses += [MissRecord(name, name, "", checkpoint.source, why) for name, why in _unused(checkpoint)]
    fold_sites(model, found, on)
    for path, one in place.stored.items():
        if one.kept:
            model.get_submodule(path.rpartition(".")[0]).__dict__[KEPT] = dict(one.kept)


def _unused(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    yield from sorted(checkpoint.unused.items())


@dataclass
class _Placement:
    """What goes where. `stored` and `plain` hold each parameter once, by the first of its paths."""

    checkpoint: Checkpoint
    model: nn.Module
    given_device: torch.device | None

    def __post_init__(self) -> None:
        self.names = parameter_names(self.model)
        self.first = {path: paths[0] for paths in self.names.values() for path in paths}
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.buffers = dict(self.model.named_buffers(remove_duplicate=False))
        self.plain: dict[str, Tensor] = {}
        self.stored: dict[str, Stored] = {}

    @property
    def device(self) -> torch.device:
        if self.given_device is not None:
            return self.given_device
        devices = [parameter.device for parameter in self.model.parameters() if not parameter.is_meta]
        return devices[0] if devices else torch.device("cpu")

    def check(self) -> None:
        if any(isinstance(module, Folded) for module in self.model.modules()):
            raise BitfoldError(
                f"this {type(self.model).__name__} is quantized already; give the skeleton as it was before"
            )
        for path, stored in self.checkpoint.stored.items():
            shape = self._shape(path)
            if stored.weight.shape != shape:
                self._misshapen(path, tuple(stored.weight.shape), shape)
            self.stored.setdefault(self.first[path], stored)
        for path, tensor in self.checkpoint.plain.items():
            if path in self.buffers:
                self._check_buffer(path, tensor)
                continue
            shape = self._shape(path)
            if tensor.shape != shape:
                self._misshapen(path, tuple(tensor.shape), shape)
            if self.first[path] not in self.stored:
                self.plain.setdefault(self.first[path], tensor)
        self._check_covered()

    def _shape(self, path: str) -> tuple[int, ...]:
        if path not in self.parameters:
            raise BitfoldError(
                f"{self.checkpoint.source} has a tensor {path!r} that this {type(self.model).__name__} "
                f"does not have{nearest(path, self.parameters)}"
            )
        return tuple(self.parameters[path].shape)

    def _check_buffer(self, path: str, tensor: Tensor) -> None:
        here = self.buffers[path]
        if tensor.shape != here.shape:
            self._misshapen(path, tuple(tensor.shape), tuple(here.shape))
        if kind(tensor.dtype) != kind(here.dtype):
            raise BitfoldError(
                f"{path} is {here.dtype} here and {tensor.dtype} in {self.checkpoint.source}, and numbers of "
                "one kind are not copied into another"
            )

    def _misshapen(self, path: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> None:
        raise BitfoldError(
            f"{path} has shape {list(ours)} here and {list(theirs)} in {self.checkpoint.source}; make the "
            "skeleton with the configuration of that checkpoint"
        )

    def _check_covered(self) -> None:
        known = {*self.plain, *self.stored}
        missing = [name for name in dict.fromkeys(self.first.values()) if name not in known]
        known |= {*self.checkpoint.plain, *computed_buffers(self.model)}
        missing += [name for name, one in self.buffers.items() if one.is_meta and name not in known]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise BitfoldError(
                f"{self.checkpoint.source} has no tensor for {missing[0]!r}{more} of this "
                f"{type(self.model).__name__}; make the skeleton with the configuration of that checkpoint, "
                "and buffers that no checkpoint holds with numbers"
            )

    def write(self) -> None:
        """The plain tensors, and for each quantized weight one that holds its place; ties stay ties."""
        for paths in self.names.values():
            old = self.parameters[paths[0]]
            new = self._made(paths[0], old)
            for path in paths:
                self._set(path, new)
        for path in self.buffers:
            tensor = self.checkpoint.plain.get(path)
            if tensor is not None:
                dtype = tensor.dtype if self.buffers[path].is_meta else self.buffers[path].dtype
                module, name = self._owner(path)
                module._buffers[name] = tensor.to(self.device, dtype)
        compute_buffers(self.model, self.device)

    def _made(self, path: str, old: Tensor) -> nn.Parameter:
        if path in self.plain:
            tensor = self.plain[path]
            dtype = tensor.dtype if old.is_meta else old.dtype
            return nn.Parameter(tensor.to(self.device, dtype), requires_grad=old.requires_grad)
        dtype = old.dtype if not old.is_meta else self._computed_in(self.stored[path])
        one = torch.zeros((), dtype=dtype, device=self.device)
        return nn.Parameter(one.expand(old.shape), requires_grad=False)

    def _computed_in(self, stored: Stored) -> torch.dtype:
        """A skeleton on meta computes in what the checkpoint says, or in its 16-bit scales' dtype."""
        scales = stored.weight.scales
        half = scales is not None and scales.dtype in (torch.bfloat16, torch.float16)
        own = scales.dtype if scales is not None and half else torch.float32
        return self.checkpoint.dtype or own

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        owner, _, name = path.rpartition(".")
        return self.model.get_submodule(owner), name

    def _set(self, path: str, parameter: nn.Parameter) -> None:
        module, name = self._owner(path)
        module._parameters[name] = parameter


def _recipe(place: _Placement) -> Recipe:
    """One rule for each layer that came quantized, under each name of its weight."""
    rules = []
    for first, stored in place.stored.items():
        for path in place.names[id(place.parameters[first])]:
            module = path.rpartition(".")[0]
            lookup = isinstance(submodule_in(place.model, module), nn.Embedding)
            rules.append(
                Rule(
                    "re:" + re.escape(module),
                    op="linear|head|conv|embedding",
                    weight=STORED,
                    input="" if lookup else stored.input,
                    observer=_GIVEN if stored.input_params and not lookup else "",
                )
            )
    return Recipe("checkpoint", tuple(rules))


def _check_all_fold(place: _Placement, found: Plan) -> None:
    """A weight that came as codes and that no site takes would be left without numbers."""
    taken = {note.stored for site in found.sites for _, note in annotated(site.gm)}
    taken = {place.first.get(path, path) for path in taken}
    for path in place.stored:
        if path not in taken:
            layer = path.rpartition(".")[0]
            why = next(
                (miss.reason for miss in found.misses if miss.module_path == layer), "no pass takes it"
            )
            raise BitfoldError(
                f"{path} came quantized in {place.checkpoint.source} and cannot stay so in this model: {why}"
            )


def _give_ranges(site: Site, stored: dict[str, Stored]) -> None:
    """Static scales of the checkpoint in the place of observed ones."""
    if not site.calibrated:
        return
    (note,) = [note for _, note in annotated(site.gm)]
    Pipeline([Observe()]).run(site.gm)
    given = Given(stored[note.stored].input_params)
    for name, module in list(site.gm.named_modules()):
        if isinstance(module, Observer):
            site.gm.set_submodule(name, given)


def _reorder(site: Site, stored: dict[str, Stored]) -> None:
    """The input in the order of the codes' columns, where that is another one."""
    for node, note in annotated(site.gm):
        order = stored[note.stored].order
        if order is None:
            continue
        if note.anchor != "linear" or note.input:
            raise BitfoldError(f"layer {note.layer}: only a linear of float inputs has its columns reordered")
        index, source = TARGETS[node.target][1], node.args[TARGETS[node.target][1]]
        held = add_constant(site.gm, "input_order", order.to(torch.int64), like=node)
        moved = call(
            site.gm, torch.ops.aten.index_select.default, (source, -1, held), before=node, origin_from=node
        )
        node.update_arg(index, moved)
        site.columns = tuple(int(place) for place in torch.argsort(order))
