"""The float run: every batch once through the model as it is, before anything is decided.

In: a model, the sites to solve and calibration batches. Out: the chains of blocks, with what each is called
with, or why there is none; and the sites outside of it, which are measured on the way.

    recorded(model, sites, batches, measures=True)   ->   [Chain(blocks 0 to 29)], [the head]

Bad data is found here: NaN, a layer that no batch reaches, fewer tokens than channels. Where a chain breaks
at a later batch, what was measured is forgotten, and its sites too are measured in another run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...formats import BitfoldError
from ...passes import Miss
from ...passes.algorithms.inputs import INPUTS
from ...passes.note import annotated
from ...passes.observing.batch import Batch, usable
from ..module_scope import Site
from .at_rest import hooked, in_order
from .blocks import Chain
from .enough_data import expected, measured, warn_of_few
from .measure import gatherer
from .record_blocks import Blocks, block_lists, record

_AT_ONCE = 1 << 28
"""Numbers of the moments that are held at a time of layers outside of chains: 1 GiB."""


def recorded(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], measures: bool
) -> tuple[list[Chain] | Miss, list[Site], dict[str, str]]:
    """The float run: the chains; the sites outside them, whose first portion is measured on the way; and why
    lists of blocks that hold sites are none, by their paths."""
    lists = block_lists(model)
    dropped: dict[str, str] = {}
    found = record(model, batches[:1], lists)  # which are chains decides what the full run measures
    while True:
        dropped |= {
            _path(one): seen.reason for one, seen in zip(lists, found, strict=True) if isinstance(seen, Miss)
        }
        lists = [one for one, seen in zip(lists, found, strict=True) if isinstance(seen, Chain)]
        if not lists:
            break
        paths = [path for one in lists for path, _ in one]
        rest = [site for site in sites if not any(within(site.path, path) for path in paths)]
        with _watched(model, sites, _looks(sites, rest, measures)) as reached:
            found = record(model, batches, lists)
        chains = [one for one in found if isinstance(one, Chain)]
        if len(chains) == len(lists):
            _check_reached(model, sites, reached)
            if measures:
                warn_of_few((*_in_chains(sites, chains), *(one for s in rest for one in measured(s.gm))))
            held = {path: why for path, why in dropped.items() if any(within(s.path, path) for s in rest)}
            return chains, rest, held
        _forget(rest)  # the next run sees the same batches again
    with _watched(model, sites, _looks(sites, sites, measures)) as reached:
        for batch in batches:
            batch.run(model)
    _check_reached(model, sites, reached)
    if measures:
        warn_of_few(one for site in sites for one in measured(site.gm))
    why = next(iter(dropped.values()), "it has no ModuleList of blocks")
    return Miss(why), list(sites), {}


def _path(blocks: Blocks) -> str:
    """Of the ModuleList that holds them."""
    return blocks[0][0].rpartition(".")[0]


def _forget(sites: Sequence[Site]) -> None:
    for site in sites:
        for node, _ in annotated(site.gm):
            node.meta.pop(INPUTS, None)


@contextmanager
def _watched(
    model: nn.Module, sites: Sequence[Site], looks: Mapping[nn.Module, Callable[..., None]]
) -> Iterator[set[nn.Module]]:
    """Some of the sites looked at meanwhile; which of them all were reached."""
    reached: set[nn.Module] = set()

    def watch(look: Callable[..., None] | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            reached.add(module)
            if look is not None:
                look(module, args, kwargs)

        return hook

    with hooked(model, {site.module: watch(looks.get(site.module)) for site in sites}):
        yield reached


def _looks(
    sites: Sequence[Site], rest: Sequence[Site], measures: bool
) -> dict[nn.Module, Callable[..., None]]:
    """Hooks that measure the first portion of what is outside of chains. Where nothing is measured, NaN would
    not be seen: it is looked for there."""
    if not measures:
        return {site.module: _finite(site) for site in sites}
    first, *later = portions(rest)
    return {site.module: gatherer(site) for site in first} | {
        site.module: _finite(site) for portion in later for site in portion
    }


def portions(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites in order, as many together as moments of `_AT_ONCE` numbers take; the first may be empty."""
    found: list[list[Site]] = [[]]
    held = 0
    for site in sites:
        size = sum(channels**2 for _, channels in expected(site.gm, 0))
        if found[-1] and held + size > _AT_ONCE:
            found.append([])
            held = 0
        found[-1].append(site)
        held += size
    return found


def measure_in_floats(model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch]) -> None:
    """Another float run, for a portion whose moments would have been too many in the first."""
    with hooked(model, {site.module: gatherer(site) for site in sites}):
        for batch in batches:
            batch.run(model)
    warn_of_few(one for site in sites for one in measured(site.gm))


def _finite(site: Site) -> Callable[..., None]:
    """A hook that refuses NaN and infinity in what goes into a site first."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(iter(in_order(module, args, kwargs)), None)
        if isinstance(x, Tensor) and x.is_floating_point() and not usable(x):
            raise BitfoldError(
                f"layer {site.path}: NaN or infinity goes into it; look at the calibration data"
            )

    return hook


def _check_reached(model: nn.Module, sites: Sequence[Site], reached: set[nn.Module]) -> None:
    # Attention reads the weight of its last linear without calling it: no batch can reach that, and solvers
    # that want its inputs report that there are none.
    only_read = {one.out_proj for one in model.modules() if isinstance(one, nn.MultiheadAttention)}
    for site in sites:
        if site.module not in reached and site.module not in only_read:
            raise BitfoldError(
                f"no calibration batch reaches layer {site.path}; give batches that do, or let a rule of the "
                "recipe skip it"
            )


def _in_chains(sites: Sequence[Site], chains: Sequence[Chain]) -> Iterator[tuple[int, int]]:
    """(tokens, channels) of the linears of blocks."""
    for chain in chains:
        tokens = sum(hidden.numel() // hidden.shape[-1] for hidden in chain.hidden)
        for site in sites:
            if any(within(site.path, path) for path in chain.paths):
                yield from expected(site.gm, tokens)


def within(path: str, block: str) -> bool:
    """Whether a site lies in a block, by their paths."""
    return path == block or path.startswith(block + ".")
