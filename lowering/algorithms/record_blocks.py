"""Whether a model is a chain of blocks, and what each of its blocks is called with: the float run.

In: a model and calibration batches. Out: the blocks of each of its lists in order and, for every batch, what
goes into each; or the reason why a list is no such chain.

    record(llama, batches, block_lists(llama))
    ->  [Chain(model.layers.0 .. 31, given [32 batches], the other arguments of each call)]

Blocks are the elements of a ModuleList that each run once, in order, the first tensor that one returns being
the first that the next is given, untouched. An encoder and a decoder are two chains, each of which begins
with what the float model gives it. Other tensors that earlier blocks returned
(a residual, a bias of positions) are followed too: a block is given what they really return. A block that
writes to one of these would change what its next run starts from, and is no link of a chain; nor is one that
fills a cache of keys and values, or that reads what its arguments do not say (a global, autocast).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...formats import BitfoldError
from ...passes import Miss
from ...passes.observing.batch import Batch
from .at_rest import at_rest, hooked
from .blocks import BlockCall, Chain, Handed, HiddenState, first_part, first_tensor
from .buffers import written

Blocks = list[tuple[str, nn.Module]]
"""The elements of a ModuleList, with their paths."""


def block_lists(model: nn.Module) -> list[Blocks]:
    """The largest ModuleList, then those that have no module in common with one before."""
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        # A list of lists is nothing that is called: those within are the lists of blocks.
        and not any(isinstance(one, nn.ModuleList) for one in module)
    ]
    found: list[Blocks] = []
    taken: set[nn.Module] = set()
    for path, blocks in sorted(lists, key=lambda one: -sum(p.numel() for p in one[1].parameters())):
        inside = set(blocks.modules())
        if not inside & taken:
            taken |= inside
            found.append([(f"{path}.{i}" if path else str(i), block) for i, block in enumerate(blocks)])
    return found


def record(model: nn.Module, batches: Sequence[Batch], lists: Sequence[Blocks]) -> list[Chain | Miss]:
    """Run the float model once on every batch: for each list its chain, or why it is none; no further than to
    the batch that shows that of one. The caller has the model in eval mode, without gradients."""
    chains = [
        Chain(tuple(p for p, _ in one), tuple(block for _, block in one), largest=place == 0)
        for place, one in enumerate(lists)
    ]
    results: list[Tensor] = []
    for batch in batches:
        seen = _record_batch(model, batch, chains)
        if any(isinstance(one, Miss) for one in seen):
            return [one if isinstance(one, Miss) else chain for chain, one in zip(chains, seen, strict=True)]
        results = results or [one.detach().clone() for one in seen if isinstance(one, Tensor)]
    # After the last batch: what the model's forward left for the blocks to find is then of that one.
    found: list[Chain | Miss] = []
    for chain, result in zip(chains, results, strict=True):
        why = _by_themselves(model, chain, result)
        found.append(Miss(why) if why else chain)
    return found


def _by_themselves(model: nn.Module, chain: Chain, expected: Tensor) -> str:
    """Why the blocks do not give for the first batch what they gave in the model; "" if they do."""
    given = chain.given[0]
    try:
        with at_rest(model):
            for place in range(len(chain.blocks)):
                given = chain.behind(place, 0, given)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        return f"its blocks do not run by themselves ({str(error).strip().split(chr(10))[0]})"
    result = given.hidden
    if result.dtype != expected.dtype or result.shape != expected.shape:
        return "its blocks give another dtype or shape when they are run by themselves"
    apart = float((result - expected).float().norm() / expected.float().norm().clamp(min=1e-12))
    # The same operators on the same numbers: half of the digits are enough to tell.
    if not apart <= torch.finfo(expected.dtype).eps ** 0.5:
        return (
            f"its blocks give something else when they are run by themselves (by {apart:.1e}): they read "
            "more than they are given"
        )
    return ""


def _record_batch(model: nn.Module, batch: Batch, chains: Sequence[Chain]) -> list[Tensor | Miss]:
    """Note one batch; each last block's result, or the reason why the blocks are no chain."""
    # Bad data shows in the largest list; what lesser ones hand on need be no hidden value at all.
    seen = [_Seen(chain, batch.name) for chain in chains]
    before = {block: one.before for one, chain in zip(seen, chains, strict=True) for block in chain.blocks}
    after = {block: one.after for one, chain in zip(seen, chains, strict=True) for block in chain.blocks}
    with hooked(model, before, after, outside=True):
        batch.run(model)
    return [_noted(one, chain) for one, chain in zip(seen, chains, strict=True)]


def _noted(seen: _Seen, chain: Chain) -> Tensor | Miss:
    """What was seen of a batch, put into the chain."""
    if seen.broken:
        return Miss(seen.broken[0])
    if seen.order != list(range(len(chain.blocks))) or seen.next is None:
        return Miss("its blocks do not each run once, in order")
    chain.given.append(HiddenState(seen.start[0], {}))
    chain.calls.append(seen.calls)
    return seen.next


class _Seen:
    """One batch's calls of blocks, while they come."""

    def __init__(self, chain: Chain, batch: str) -> None:
        self.batch, self.strict = batch, chain.largest
        self.paths = dict(zip(chain.blocks, chain.paths, strict=True))
        self.index = {block: i for i, block in enumerate(chain.blocks)}
        self.order: list[int] = []
        self.start: list[Tensor] = []
        self.calls: list[BlockCall] = []
        self.broken: list[str] = []
        self.handed: dict[int, tuple[weakref.ref[Tensor], int, Handed]] = {}  # by identity, with versions
        self.next: Tensor | None = None
        self.others: list[tuple[Tensor, int]] = []

    def before(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        path = self.paths[block]
        value, call = _emptied(args, kwargs)
        if value is None:
            self.broken.append(f"block {path} is given no tensor")
            return
        if not self.order:
            self._check_finite(value, f"before {path}")
            self.start.append(value.detach().clone())
        elif self.next is not value:
            self.broken.append(f"block {path} is not given what the one before it returned")
        if any(hasattr(one, "get_seq_length") for one in (*args, *kwargs.values())):
            self.broken.append(
                f"block {path} is given a cache, which each run of it would add to (use_cache=False)"
            )
        others = [one for one in pytree.tree_leaves(call) if isinstance(one, Tensor)]
        if any(self._changed(one) for one in (value, *others)):
            self.broken.append(
                f"block {path} is not given what the one before it returned: it was changed in place since"
            )
        self.others = [(one, written(one)) for one in others]
        self.order.append(self.index[block])
        self.calls.append(pytree.tree_map_only(Tensor, self._named, call))

    def after(self, block: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if any(written(one) != version for one, version in self.others):
            self.broken.append(
                f"block {self.paths[block]} writes to what it is given beside the first tensor"
            )
        if not isinstance(first_part(result), Tensor):
            self.broken.append(f"block {self.paths[block]} returns no tensor first")
            return
        self.next = first_tensor(result)
        self._check_finite(self.next, f"behind {self.paths[block]}")
        for leaf, one in enumerate(pytree.tree_leaves(result)):
            if isinstance(one, Tensor):
                known = weakref.ref(one), written(one), Handed(self.index[block], leaf)
                self.handed[id(one)] = known

    def _check_finite(self, value: Tensor, where: str) -> None:
        if not bool(torch.isfinite(value).all()):
            if self.strict:
                raise BitfoldError(f"{self.batch} gives NaN or infinity {where}; leave it out")
            self.broken.append(f"there is NaN or infinity {where}")

    def _changed(self, tensor: Tensor) -> bool:
        ref, version, _ = self.handed.get(id(tensor), _NOTHING)
        return ref() is tensor and version != written(tensor)

    def _named(self, tensor: Tensor) -> Tensor | Handed:
        ref, _, name = self.handed.get(id(tensor), _NOTHING)
        return name if ref() is tensor else tensor


_NOTHING: tuple[Callable[[], Tensor | None], int, Handed] = (lambda: None, 0, Handed(-1, -1))


def _emptied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, BlockCall]:
    """The first tensor of a call, and the call without it."""
    if args and isinstance(args[0], Tensor):
        return args[0], ((None, *args[1:]), dict(kwargs))
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return value, (args, {**kwargs, name: None, "": name})
    return None, (args, kwargs)
