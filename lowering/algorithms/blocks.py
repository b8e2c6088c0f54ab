"""A model as a chain of blocks: what lets an algorithm hold one block's activations at a time.

In: a model and calibration batches. Out: its blocks in order and, for every batch, what goes into each; or
the reason why the model is no such chain.

    record(llama, batches)  ->  Chain(model.layers.0 .. 31, hidden [32 batches], the other arguments of each
    call)

The blocks are the elements of the largest ModuleList whose elements each run once, in order, the first tensor
that one returns being the first that the next is given, untouched. Other tensors that earlier blocks returned
(a residual, a bias of positions) are followed too: a block is given what they really return. Everything else
that a block is called with (masks, rotary angles) is remembered by reference: models hand the same objects to
all blocks. A block that writes to one of these would change what its next run starts from, and is no link of
a chain; nor is one that fills a cache of keys and values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...formats import BitfoldError
from ...passes import Miss
from .calibration import Batch, hooked

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Handed:
    """In the place of an argument: the tensor that `block` returned as this leaf of its result."""

    block: int
    leaf: int


@dataclass(frozen=True)
class Given:
    """What the next block is given of those before it: the hidden value, and others that later calls take."""

    hidden: Tensor
    handed: dict[Handed, Tensor]


@dataclass
class Chain:
    """`given`: for each batch, what goes into the block that is next. `calls`: batch by batch, block by
    block, the arguments, the hidden value among them replaced by None; `exact`: as `given` in the float
    model, if wanted."""

    paths: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    given: list[Given] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    exact: list[Given] = field(default_factory=list)

    @property
    def hidden(self) -> list[Tensor]:
        """The hidden value of each batch."""
        return [one.hidden for one in self.given]

    def run(self, block: int, batch: int) -> Tensor:
        """The block's result for the batch, from the hidden value as it is now."""
        args, kwargs = self.arguments(block, batch)
        return first_tensor(self.blocks[block](*args, **kwargs))

    def run_exact(self, block: int, batch: int) -> Tensor:
        """The block's result in the float model, if its weights are the float ones now."""
        args, kwargs = self._arguments(block, batch, self.exact[batch])
        return first_tensor(self.blocks[block](*args, **kwargs))

    def behind(self, block: int, batch: int, given: Given) -> Given:
        """What the next block is given, if this one is given that."""
        args, kwargs = self._arguments(block, batch, given)
        result = self.blocks[block](*args, **kwargs)
        here = {Handed(block, leaf): one for leaf, one in enumerate(pytree.tree_leaves(result))}
        leaves = pytree.tree_leaves(self.calls[batch][block + 1 :])
        later = {one for one in leaves if isinstance(one, Handed)}
        handed = {key: one for key, one in (given.handed | here).items() if key in later}
        return Given(first_tensor(result), handed)

    def arguments(self, block: int, batch: int = 0) -> Call:
        """What the block is called with."""
        return self._arguments(block, batch, self.given[batch])

    def _arguments(self, block: int, batch: int, given: Given) -> Call:
        call: Call = pytree.tree_map_only(Handed, given.handed.__getitem__, self.calls[batch][block])
        # A copy: a block that adds to what it is given would change what the next run of it starts from.
        return _filled(call, given.hidden.clone())


def record(model: nn.Module, batches: Sequence[Batch]) -> Chain | Miss:
    """Run the float model once on every batch. The caller has it in eval mode, without gradients."""
    found = _largest_list(model)
    if found is None:
        return Miss("it has no ModuleList of blocks")
    chain = Chain(tuple(path for path, _ in found), tuple(block for _, block in found))
    for batch in batches:
        why = _record_batch(model, batch, chain)
        if why:
            return Miss(why)
    return chain


def first_tensor(result: Any) -> Tensor:
    """What a block hands on: its result, or the first part of it."""
    value = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(value, Tensor):
        raise BitfoldError(f"a block returned a {type(value).__name__}, not a tensor")
    return value


def _largest_list(model: nn.Module) -> list[tuple[str, nn.Module]] | None:
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    if not lists:
        return None
    path, blocks = max(lists, key=lambda one: sum(p.numel() for p in one[1].parameters()))
    return [(f"{path}.{index}" if path else str(index), block) for index, block in enumerate(blocks)]


def _record_batch(model: nn.Module, batch: Batch, chain: Chain) -> str:
    """Note one batch; the reason why the blocks are no chain, or "" if they are."""
    seen = _Seen(chain)
    before, after = dict.fromkeys(chain.blocks, seen.before), dict.fromkeys(chain.blocks, seen.after)
    with hooked(model, before, after, outside=True):
        batch.run(model)
    if seen.broken:
        return seen.broken[0]
    if seen.order != list(range(len(chain.blocks))):
        return "its blocks do not each run once, in order"
    chain.given.append(Given(seen.start[0], {}))
    chain.calls.append(seen.calls)
    return ""


class _Seen:
    """One batch's calls of blocks, while they come."""

    def __init__(self, chain: Chain) -> None:
        self.paths = dict(zip(chain.blocks, chain.paths, strict=True))
        self.index = {block: i for i, block in enumerate(chain.blocks)}
        self.order: list[int] = []
        self.start: list[Tensor] = []
        self.calls: list[Call] = []
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
        self.others = [(one, _version(one)) for one in others]
        self.order.append(self.index[block])
        self.calls.append(pytree.tree_map_only(Tensor, self._named, call))

    def after(self, block: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if any(_version(one) != version for one, version in self.others):
            self.broken.append(
                f"block {self.paths[block]} writes to what it is given beside the first tensor"
            )
        self.next = first_tensor(result)
        for leaf, one in enumerate(pytree.tree_leaves(result)):
            if isinstance(one, Tensor):
                known = weakref.ref(one), _version(one), Handed(self.index[block], leaf)
                self.handed[id(one)] = known

    def _changed(self, tensor: Tensor) -> bool:
        ref, version, _ = self.handed.get(id(tensor), _NOTHING)
        return ref() is tensor and version != _version(tensor)

    def _named(self, tensor: Tensor) -> Tensor | Handed:
        ref, _, name = self.handed.get(id(tensor), _NOTHING)
        return name if ref() is tensor else tensor


_NOTHING: tuple[Callable[[], Tensor | None], int, Handed] = (lambda: None, 0, Handed(-1, -1))


def _version(tensor: Tensor) -> int:
    """Goes up with every write, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version


def _emptied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Call]:
    """The first tensor of a call, and the call without it."""
    if args and isinstance(args[0], Tensor):
        return args[0], ((None, *args[1:]), dict(kwargs))
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return value, (args, {**kwargs, name: None, "": name})
    return None, (args, kwargs)


def _filled(call: Call, value: Tensor) -> Call:
    args, kwargs = call
    if "" in kwargs:
        name = kwargs[""]
        return args, {**{key: one for key, one in kwargs.items() if key}, name: value}
    return (value, *args[1:]), kwargs


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """transformers' models, also those within others, do not fill a cache of keys and values meanwhile: a
    block run twice would add twice."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None))
    }
    filling: list[Any] = [one for one in configs.values() if getattr(one, "use_cache", False) is True]
    for config in filling:
        config.use_cache = False
    try:
        yield
    finally:
        for config in filling:
            config.use_cache = True
