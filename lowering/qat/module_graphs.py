"""The graphs of a model's modules, ready to train; nothing is written to the model.

In: sites of the recipe, with the ranges that calibration found, and what all modules are prepared by. Out:
their graphs with roundings that train and batch norm folded in, and the graph of each batch norm that is not
folded but freezes. What cannot train so is a BitfoldError.

    Site("fc", graph: linear(x, weight))
    ->  linear(x, train_quantize(weight, "int4", "lsq", [weight_step], ..))
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from ...formats import BitfoldError
from ...passes import MissRecord, Pipeline, capture_module
from ...passes.training.freeze_norm import FreezeNorm
from ...passes.training.quantizers import CLOCK, Range, ranges
from ...passes.training.share_learned import share_learned
from ..module_scope import Call, Site
from .following_norms import NORMS, Norm
from .kernels import check_kernels
from .options import Qat
from .passes_of import train_pass
from .prepared import ATTRIBUTES
from .with_norm import NAMES, PREFIX, with_norm


@dataclass(frozen=True)
class Order:
    """What all modules of a model are prepared by: recipe and options; calls: what modules of kinds that are
    not known are called with; earlier: what an earlier preparation had added, by path; loaded: a state brings
    all numbers; tables: the identities of weights of embeddings; teacher: the mark of the model's, or ""."""

    recipe: str
    options: Qat
    calls: Mapping[nn.Module, Call]
    earlier: Mapping[str, Mapping[str, Tensor]]
    loaded: bool
    tables: frozenset[int]
    teacher: str

    @property
    def ranged(self) -> bool:
        """Whether ranges are known: those that an earlier recipe had go on, where numbers that it had learned
        are of other formats."""
        return self.loaded or (bool(self.earlier) and not self.options.activation_learns)

    @property
    def clock(self) -> Tensor | None:
        """The step that an earlier preparation had come to."""
        clocks = [tensors[CLOCK] for tensors in self.earlier.values() if CLOCK in tensors]
        return max(clocks, key=int) if clocks else None

    def going_on(self, path: str, name: str, new: Tensor, followed: Iterable[Range]) -> Tensor:
        """What an earlier recipe had under this name, if it can stay: a parameter, which gets new numbers, or
        a buffer, but for those of what a step has seen."""
        earlier = self.earlier.get(path, {})
        if name == CLOCK:
            clock = self.clock
            return earlier.get(name, new if clock is None else clock.to(new.device, copy=True))
        old = earlier.get(name)
        if (
            old is None
            or old.shape != new.shape
            or isinstance(old, nn.Parameter) != isinstance(new, nn.Parameter)
        ):
            return new
        if isinstance(new, nn.Parameter):
            return old
        seen = any(name in (one.seen_low, one.seen_high) for one in followed)
        unseen = not seen and new.is_floating_point() and not bool(new.isfinite().all())
        return old if unseen else new


def train_site(
    site: Site, order: Order, norms: dict[str, Norm], shared: dict[Hashable, nn.Parameter]
) -> list[MissRecord]:
    """Make a site's graph one that trains; what it does not get. `norms`: by the site's path, from which a
    batch norm goes that stays alone; `shared`: learned scales of the model."""
    how, misses = order.options, []
    Pipeline([train_pass(how, ranged=order.ranged, loaded=order.loaded)]).run(site.gm, record=False)
    norm = norms.get(site.path)
    if norm is not None and not with_norm(site.gm, norm.module, how, loaded=order.loaded):
        del norms[site.path]
        reason = "what the convolution gives is rounded before batch norm reads it"
        misses.append(MissRecord(norm.path, norm.path, "", "fold_norm", reason))
    misses += check_kernels(site.gm)
    share_learned(site.gm, shared)
    own = {name for name, _ in (*site.module.named_parameters(), *site.module.named_buffers())}
    own |= {f"{PREFIX}.{name}" for name in NAMES}
    held = (*site.gm.named_parameters(), *site.gm.named_buffers())
    _check_attributes(site.path, site.module, [name for name, _ in held if name not in own])
    clock = order.clock
    moves = bool(how.observe) and (clock is None or int(clock) < how.observe)
    if not moves and not order.loaded:
        _check_ranges(site, order, own)
    return misses


def freezing(
    model: nn.Module, norms: Mapping[str, Norm], how: Qat
) -> tuple[list[tuple[Norm, GraphModule]], list[MissRecord]]:
    """Batch norms that nothing folds (`norms`: those that are) and that freeze, with their graphs; and those
    whose statistics move on."""
    found: list[tuple[Norm, GraphModule]] = []
    misses: list[MissRecord] = []
    folded = {norm.module for norm in norms.values()}
    for path, module in model.named_modules():
        if how.freeze_norm is None or not isinstance(module, _BatchNorm):
            continue
        if module in folded or module.running_mean is None:
            continue
        if type(module) not in NORMS or "forward" in module.__dict__:
            reason = f"a {type(module).__name__} with a forward of its own does, and its statistics move on"
            misses.append(MissRecord(path, path, "", "freeze_norm", reason))
            continue
        _check_attributes(path, module, [CLOCK])
        found.append((Norm(path, module), _freezing(path, module, how.freeze_norm)))
    return found, misses


def _freezing(path: str, norm: _BatchNorm, step: int) -> GraphModule:
    sizes = (3,) * (1 + NORMS.index(type(norm)))
    mean = norm.get_buffer("running_mean")
    x = torch.zeros((2, len(mean), *sizes), dtype=mean.dtype, device=mean.device)
    training, norm.training = norm.training, False
    try:
        gm = capture_module(norm, (x,), path=path, dynamic_batch=False)
    finally:
        norm.training = training
    Pipeline([FreezeNorm(step=step)]).run(gm, record=False)
    return gm


def no_range(layer: str) -> BitfoldError:
    """What is said where nothing tells a range."""
    return BitfoldError(
        f"layer {layer} takes activations of calibrated range; give calibration=[batches], or let "
        "training find them: bf.Qat(observe=200), with bf.advance(model) after each step"
    )


def _check_attributes(path: str, module: nn.Module, names: Iterable[str]) -> None:
    taken = next((name for name in (*names, *ATTRIBUTES) if hasattr(module, name)), None)
    if taken is not None:
        raise BitfoldError(
            f"layer {path} has an attribute {taken!r} already, which training it rounded needs; "
            "rename it, or leave the layer out by a skip rule"
        )


def _check_ranges(site: Site, order: Order, own: set[str]) -> None:
    """Raises BitfoldError if a range that nothing will move (from the step `observe` on nothing does) has
    seen nothing, now or under an earlier recipe."""
    followed = ranges(site.gm)
    seen = {name for one in followed for name in (one.seen_low, one.seen_high)}
    for name, held in site.gm.named_buffers():
        if name in own or name in seen or not held.is_floating_point():
            continue
        if not bool(order.going_on(site.path, name, held, followed).isfinite().all()):
            raise no_range(site.path)
