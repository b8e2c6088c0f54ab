"""The float run: every batch once through the model as it is, before anything is decided.

In: a model, the sites to solve and calibration batches. Out: the chain of blocks, with what each is called
with, or why there is none; and the sites outside of it, which are measured on the way.

    recorded(model, sites, batches, measures=True)   ->   Chain(blocks 0 to 29), [the head]

Bad data is found here: NaN, a layer that no batch reaches, fewer tokens than channels. Where the chain breaks
at a later batch, what was measured is forgotten, and all sites are measured in a second run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ...formats import BitfoldError
from ...passes import Miss
from ...passes.algorithms.inputs import INPUTS
from ...passes.anchors import TARGETS
from ...passes.note import annotated
from ...passes.observing.calibrate import usable
from ..module_scope import Site
from .blocks import Chain
from .calibration import Batch, hooked, in_order
from .measure import gatherer
from .record_blocks import record


def recorded(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], measures: bool
) -> tuple[Chain | Miss, list[Site]]:
    """The float run: the chain, and the sites outside it, which are measured on the way."""
    chain = record(model, batches[:1])  # whether there is a chain decides what the full run measures
    if isinstance(chain, Chain):
        paths = chain.paths
        rest = [site for site in sites if not any(within(site.path, path) for path in paths)]
        with _watched(model, sites, rest, measures) as reached:
            chain = record(model, batches)
        if isinstance(chain, Chain):
            _check_reached(sites, reached)
            _check_finite(chain)
            if measures:
                _check_count(sites, chain)
            return chain, rest
        _forget(rest)  # the run below sees the same batches again
    with _watched(model, sites, sites, measures) as reached:
        for batch in batches:
            batch.run(model)
    _check_reached(sites, reached)
    return chain, list(sites)


def _forget(sites: Sequence[Site]) -> None:
    for site in sites:
        for node, _ in annotated(site.gm):
            node.meta.pop(INPUTS, None)


@contextmanager
def _watched(
    model: nn.Module, sites: Sequence[Site], measured: Sequence[Site], measures: bool
) -> Iterator[set[nn.Module]]:
    """Some of the sites measured meanwhile; which of them all were reached. An algorithm that measures
    nothing would not see NaN: all are looked at for that then."""
    reached: set[nn.Module] = set()

    def watch(look: Callable[..., None] | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            reached.add(module)
            if look is not None:
                look(module, args, kwargs)

        return hook

    chosen, look = (measured, gatherer) if measures else (sites, _finite)
    looks = {site.module: look(site) for site in chosen}
    with hooked(model, {site.module: watch(looks.get(site.module)) for site in sites}):
        yield reached


def _finite(site: Site) -> Callable[..., None]:
    """A hook that refuses NaN and infinity in what goes into a site first."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(iter(in_order(module, args, kwargs)), None)
        if isinstance(x, Tensor) and x.is_floating_point() and not usable(x):
            raise BitfoldError(
                f"layer {site.path}: NaN or infinity goes into it; look at the calibration data"
            )

    return hook


def _check_reached(sites: Sequence[Site], reached: set[nn.Module]) -> None:
    for site in sites:
        if site.module not in reached:
            raise BitfoldError(
                f"no calibration batch reaches layer {site.path}; give batches that do, or let a rule of the "
                "recipe skip it"
            )


def _check_finite(chain: Chain) -> None:
    for batch, hidden in enumerate(chain.hidden):
        if not bool(torch.isfinite(hidden).all()):
            raise BitfoldError(
                f"calibration batch {batch} gives NaN or infinity before {chain.paths[0]}; leave it out"
            )


def _check_count(sites: Sequence[Site], chain: Chain) -> None:
    tokens = sum(hidden.numel() // hidden.shape[-1] for hidden in chain.hidden)
    k = max((note_k for site in sites for note_k in _widths(site)), default=0)
    if tokens < k:
        warnings.warn(
            f"calibration has {tokens} tokens for layers of up to {k} channels; give several times as many "
            "tokens as channels, or the codes will fit these tokens and little else",
            stacklevel=2,
        )


def _widths(site: Site) -> Iterator[int]:
    for node, note in annotated(site.gm):
        operand = node.args[TARGETS[node.target][2]]
        if note.anchor == "linear" and isinstance(operand, Node):
            yield int(operand.meta["val"].shape[-1])


def within(path: str, block: str) -> bool:
    """Whether a site lies in a block, by their paths."""
    return path == block or path.startswith(block + ".")
