"""The write: modules of a model become prepared ones, in place, and what they were again if need be.

In: graphs that train (`module_graphs.py`). Out: the same module objects, prepared.

    writer.write(site)  ->  model.fc is a PreparedLinear;   writer.take_back()  ->  it is an nn.Linear

Modules that are alike share their bodies, so that torch.compile compiles them once. Parameters that an
earlier recipe had learned stay the same objects, with new numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ...passes.stages import find_attribute
from ...passes.training.quantizers import ranges
from ..module_scope import Site
from .bodies import NORM_NUMBERS, Bodies, bodies_of
from .following_norms import Norm
from .module_graphs import Order
from .preparation import Preparation
from .prepared import Prepared, prepare_module
from .trained_as import trained_as
from .unprepared import unprepare
from .with_norm import identity


class Writer:
    """Writes the modules of one model, and remembers what it wrote."""

    def __init__(self, order: Order, norms: Mapping[str, Norm]) -> None:
        """`norms`: the batch norm that each site computes, by the site's path."""
        self.order, self.norms = order, norms
        self.bodies: dict[Hashable, Bodies] = {}
        self.written: list[nn.Module] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []

    def write(self, site: Site) -> None:
        """Make a site's module a prepared one; the batch norm that it computes then gives back what it
        gets."""
        order, module, norm = self.order, site.module, self.norms.get(site.path)
        weight = module._parameters.get("weight")
        call = order.calls.get(module)
        about = Preparation(
            site.path,
            order.recipe,
            order.options,
            tied_head=not isinstance(module, nn.Embedding) and id(weight) in order.tables,
            call=None if call is None else tuple((tuple(given.shape), given.dtype) for given in call[0]),
            trains=trained_as(site.gm, order.options),
            ranges=ranges(site.gm),
            teacher=order.teacher,
        )
        self._prepare(module, site.gm, about, site.ranks, None if norm is None else norm.module)
        if norm is not None:
            about = Preparation(norm.path, order.recipe, order.options, folded_away=True)
            self._prepare(norm.module, identity(norm.path), about, None, None)
            norm.module.__dict__["folded_into"] = (module,)  # whose clock it goes by, and no child

    def write_freezing(self, norm: Norm, gm: GraphModule) -> None:
        """Make a batch norm one that freezes."""
        about = Preparation(norm.path, self.order.recipe, self.order.options, freezes=True)
        self._prepare(norm.module, gm, about, None, norm.module)

    def take_back(self) -> None:
        """Make all modules what they were."""
        for module in self.written:
            assert isinstance(module, Prepared)
            unprepare(module)
        with torch.no_grad():
            for parameter, numbers in reversed(self.overwritten):  # tied ones come twice
                parameter.copy_(numbers)

    def _prepare(
        self,
        module: nn.Module,
        gm: GraphModule,
        about: Preparation,
        ranks: tuple[int, ...] | None,
        norm: nn.Module | None,
    ) -> None:
        bodies, attributes = bodies_of(gm)
        bodies = self.bodies.setdefault(tuple(body.code for body in bodies), bodies)
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        new = {
            name: find_attribute(gm, name)
            for name in attributes
            if name not in held and name not in NORM_NUMBERS and "." not in name
        }
        extra = {
            name: self.order.going_on(about.path, name, tensor, about.ranges) for name, tensor in new.items()
        }
        self._begin_anew(extra, new)
        prepare_module(module, bodies, attributes, extra, about, ranks, norm)
        self.written.append(module)

    def _begin_anew(self, extra: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
        """Parameters that go on get the numbers that they begin with under this recipe."""
        for name, parameter in extra.items():
            if isinstance(parameter, nn.Parameter) and parameter is not new[name]:
                self.overwritten.append((parameter, parameter.detach().clone()))
                with torch.no_grad():
                    parameter.copy_(new[name])
