"""Rounded weights in place of a module's float ones, for as long as a block of code runs.

In: sites whose codes are decided. Out: the model computing with them, and afterwards as it was.

    with Swaps() as swaps: swaps.put(site); model(x)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..formats import BitfoldError, Quantized, format
from ..passes import expression
from ..passes.algorithms.draft import DRAFT, Draft
from ..passes.anchors import TARGETS
from ..passes.core import below, state
from ..passes.note import Note, annotated
from ..passes.scopes.module import is_stock
from .module_scope import Plan, Site
from .steps_back import back_from
from .turned import turned


class Swaps:
    """Rounded weights in place of float ones, until the end of a `with`."""

    def __init__(self) -> None:
        self._held: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        self._rounded: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        self._lifted = False
        self._handles: list[Any] = []
        self._hooked: set[nn.Module] = set()

    def __enter__(self) -> Swaps:
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, parameter in reversed(self._held):
            owner._parameters[name] = parameter
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Without what was rounded, for as long as a block of code runs; what was balanced stays."""
        now = [(owner, name, owner._parameters[name]) for owner, name, _ in self._rounded]
        try:
            self._lifted = True
            for owner, name, parameter in reversed(self._rounded):
                owner._parameters[name] = parameter
            yield
        finally:
            self._lifted = False
            for owner, name, parameter in now:
                owner._parameters[name] = parameter

    def put(self, site: Site) -> None:
        """The site's decided weights, as the folded module will have them; and its inputs rounded, if they
        are."""
        for node, note in annotated(site.gm):
            found = node.meta.get(DRAFT)
            rows = None
            if note.weight and note.stored:
                rows = state(site.gm).stored[note.stored].dequantize()
            elif note.weight and isinstance(found, Quantized):
                rows = found.dequantize()
            elif note.weight and isinstance(found, Draft):
                rows = found.rounded(format(note.weight))
            if rows is not None:
                # The module has no transform of its own yet: its weight has the inverse meanwhile.
                rows = torch.ops.bitfold.hadamard(rows, True) if turned(node) else rows
                self._weight(site, node, note, rows)
            # Once: a site is put again when its weights are better, and rounding twice is not rounding once.
            if note.input and not note.observer and is_stock(site.module) and site.module not in self._hooked:
                self._hooked.add(site.module)
                hook = self._rounding(note.input, turned(node))
                self._handles.append(site.module.register_forward_pre_hook(hook, with_kwargs=True))

    def _weight(self, site: Site, node: Node, note: Note, rows: Tensor) -> None:
        operand = node.args[TARGETS[node.target][2]]
        assert isinstance(operand, Node)
        chain = expression(site.gm, operand)
        back = back_from(chain, note.anchor) if chain is not None else None
        if chain is None or back is None:
            return
        value = rows.to(chain.parameter.dtype)
        for what, arguments in back:
            value = value.reshape(arguments) if what == "reshape" else value.permute(arguments)
        own = below(chain.path, site.path)
        prefix, _, name = own.rpartition(".")
        owner = site.module.get_submodule(prefix)
        self._rounded.append((owner, name, owner._parameters.get(name)))
        self.replace(owner, name, value)

    def replace(self, owner: nn.Module, name: str, value: Tensor) -> None:
        """`value` as the owner's parameter of this name."""
        self._held.append((owner, name, owner._parameters.get(name)))
        owner._parameters[name] = nn.Parameter(value, requires_grad=False)

    def _rounding(self, text: str, through: bool) -> Callable[..., Any]:
        def rounded(given: Tensor) -> Tensor:
            x: Tensor = torch.ops.bitfold.hadamard(given) if through else given
            # The operator, not the format's method: it lets the gradient straight through.
            x = torch.ops.bitfold.fake_quantize(x, text)
            back: Tensor = torch.ops.bitfold.hadamard(x, True) if through else x
            return back

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._lifted:
                return None
            if args:
                return (rounded(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "input": rounded(kwargs["input"])}  # what stock layers call it

        return hook


def check_changes(model: nn.Module, changes: Mapping[str, Tensor], found: Plan) -> None:
    """Raises BitfoldError, before anything is written, for what is no new value of a parameter, or of one
    that takes codes."""
    owners = dict(model.named_modules(remove_duplicate=False))
    folded = {id(site.module._parameters.get("weight")): site.path for site in found.sites}
    for path, value in changes.items():
        prefix, _, name = path.rpartition(".")
        owner = owners.get(prefix)
        if owner is None or name not in owner._parameters:
            raise BitfoldError(
                f"an algorithm gives a new value for {path!r}, and the model has no such parameter"
            )
        layer = folded.get(id(owner._parameters[name])) if owner._parameters[name] is not None else None
        if layer is not None:
            raise BitfoldError(
                f"an algorithm gives a new value for {path!r}, which is folded; decide the codes of layer "
                f"{layer} instead"
            )
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise BitfoldError(
                f"an algorithm gives {path!r} a {type(value).__name__} of no floating point; give a tensor"
            )
        held = owner._parameters[name]
        if held is not None and held.shape != value.shape:
            raise BitfoldError(
                f"an algorithm gives {path!r} a tensor of shape {list(value.shape)}, and the parameter has "
                f"{list(held.shape)}"
            )


@contextmanager
def changed(model: nn.Module, changes: Mapping[str, Tensor], found: Plan) -> Iterator[None]:
    """Write new values into parameters, around the folding of the weights that were scaled to match them.

    If folding stops midway, the layers that are still float get what their codes stand for: otherwise they
    would read channels of another size than they were made for.
    """
    for path, value in changes.items():
        # New parameters: the old ones may be another model's too.
        prefix, _, name = path.rpartition(".")
        owner = model.get_submodule(prefix)
        held = owner._parameters.get(name)  # None: a bias that the layer has not had
        trains = held is not None and held.requires_grad
        owner._parameters[name] = nn.Parameter(value, trains)
    try:
        yield
    except BaseException:
        if changes:
            for site in found.sites:
                Swaps().put(site)
        raise


@contextmanager
def as_decided(model: nn.Module, changes: Mapping[str, Tensor], found: Plan) -> Iterator[None]:
    """The whole model as it will be folded, meanwhile, if an algorithm has decided codes: ranges of
    activations are
    those behind rounded weights, and of channels as they were balanced."""
    with Swaps() as swaps:
        for path, value in changes.items():
            prefix, _, name = path.rpartition(".")
            swaps.replace(model.get_submodule(prefix), name, value)
        for site in found.sites:
            swaps.put(site)
        yield
