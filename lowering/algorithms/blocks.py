"""A model as a chain of blocks: what lets an algorithm hold one block's activations at a time.

In: what each block was called with (`record_blocks.py`). Out: any block's result for any batch, given what
the blocks before it give now.

    chain.run(5, batch)     block 5, behind blocks 0 to 4 as they were when `given` was last moved on

Everything that a block is called with but what earlier blocks return (masks, rotary angles) is remembered by
reference: models hand the same objects to all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...formats import BitfoldError

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Handed:
    """In the place of an argument: the tensor that `block` returned as this leaf of its result."""

    block: int
    leaf: int


@dataclass(frozen=True)
class HiddenState:
    """What the next block is given of those before it: the hidden value, and others that later calls take."""

    hidden: Tensor
    handed: dict[Handed, Tensor]


@dataclass
class Chain:
    """`given`: for each batch, what goes into the block that is next. `calls`: batch by batch, block by
    block, the arguments, the hidden value among them replaced by None; `exact`: as `given` in the float
    model, if wanted; `largest`: whether no other list of the model's has more parameters."""

    paths: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    given: list[HiddenState] = field(default_factory=list)
    calls: list[list[BlockCall]] = field(default_factory=list)
    exact: list[HiddenState] = field(default_factory=list)
    largest: bool = True

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

    def behind(self, block: int, batch: int, given: HiddenState) -> HiddenState:
        """What the next block is given, if this one is given that."""
        args, kwargs = self._arguments(block, batch, given)
        result = self.blocks[block](*args, **kwargs)
        here = {Handed(block, leaf): one for leaf, one in enumerate(pytree.tree_leaves(result))}
        leaves = pytree.tree_leaves(self.calls[batch][block + 1 :])
        later = {one for one in leaves if isinstance(one, Handed)}
        handed = {key: one for key, one in (given.handed | here).items() if key in later}
        return HiddenState(first_tensor(result), handed)

    def arguments(self, block: int, batch: int = 0) -> BlockCall:
        """What the block is called with."""
        return self._arguments(block, batch, self.given[batch])

    def _arguments(self, block: int, batch: int, given: HiddenState) -> BlockCall:
        call: BlockCall = pytree.tree_map_only(Handed, given.handed.__getitem__, self.calls[batch][block])
        # A copy: a block that adds to what it is given would change what the next run of it starts from.
        return _filled(call, given.hidden.clone())


def first_part(result: Any) -> Any:
    """A block's result, or the first part of it."""
    return result[0] if isinstance(result, tuple | list) and result else result


def first_tensor(result: Any) -> Tensor:
    """What a block hands on."""
    value = first_part(result)
    if not isinstance(value, Tensor):
        raise BitfoldError(f"a block returned a {type(value).__name__}, not a tensor")
    return value


def _filled(call: BlockCall, value: Tensor) -> BlockCall:
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
