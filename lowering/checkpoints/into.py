"""A checkpoint into its skeleton: checked against it, then written, module by module.

In: a `Checkpoint` and a model of the same architecture, with numbers or on meta. Out: the model, its plain
tensors in place and its quantized layers folded with the checkpoint's own codes.

    checkpoint: up.weight int4[g128], norm.weight bf16     skeleton: up: Linear, norm: RMSNorm
    ->          up: FoldedLinear(codes, scales), norm.weight

A quantized weight is put in as a parameter of one number in all its places first, which holds its own place
while the layers are captured. Whatever fails before folding leaves the skeleton as it was.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ...formats import BitfoldError
from ...passes import MissRecord, Pipeline, add_constant, call
from ...passes.anchors import TARGETS
from ...passes.note import annotated
from ...passes.observing.observe import Observe
from ...passes.observing.observers import FixedRange, Observer
from ...passes.recipes import Recipe
from ...passes.rules import STORED, Rule, exactly
from ..files.skeleton import submodule_in
from ..fold_sites import fold_sites
from ..install import resolve_target
from ..module_scope import Plan, Site, plan
from .checkpoint import Checkpoint, Stored
from .placement import Placement

KEPT = "bitfold_kept"
"""On a folded module: what the checkpoint said of it that no part of the codes says (`Stored.kept`)."""

_GIVEN = "minmax"
"""An observer's name that marks an edge as static; what stands there is a `FixedRange`."""


def put(checkpoint: Checkpoint, model: nn.Module, *, target: str | None, device: torch.device | None) -> None:
    """Fold the checkpoint into `model`, in place. Raises BitfoldError, with the model as it was."""
    place = Placement(checkpoint, model, device)
    place.check()
    on = resolve_target(target, place.device)
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        place.write()
        found = plan(model, _recipe(place), stored={p: s.weight for p, s in place.stored.items()})
        _check_all_fold(place, found)
        named = {path: place.stored[one] for path, one in place.first.items() if one in place.stored}
        for site in found.sites:
            _give_ranges(site, named)
            _reorder(site, named)
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


def _recipe(place: Placement) -> Recipe:
    """One rule for each layer that came quantized, under each name of its weight."""
    rules = []
    for first, stored in place.stored.items():
        for path in place.names[id(place.parameters[first])]:
            module = path.rpartition(".")[0]
            lookup = isinstance(submodule_in(place.model, module), nn.Embedding)
            rules.append(
                Rule(
                    exactly(module),
                    op="linear|head|conv|embedding",
                    weight=STORED,
                    input="" if lookup else stored.input,
                    observer=_GIVEN if stored.input_params and not lookup else "",
                )
            )
    return Recipe("checkpoint", tuple(rules))


def _check_all_fold(place: Placement, found: Plan) -> None:
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
    given = FixedRange(stored[note.stored].input_params)
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
