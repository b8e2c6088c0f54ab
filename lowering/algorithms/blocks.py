"""A model as a chain of blocks: what lets an algorithm hold one block's activations at a time.

In: a model and calibration batches. Out: its blocks in order and, for every batch, what goes into each; or
the reason why the model is no such chain.

    record(llama, batches)  ->  Chain(model.layers.0 .. 31, hidden [32 batches], the other arguments of each
    call)

The blocks are the elements of the largest ModuleList whose elements each run once, in order, the first tensor
that one returns being the first that the next is given, unchanged. Everything else that a block is called
with (masks, rotary angles) is remembered by reference: models hand the same objects to all blocks. So it may
be neither another block's result nor written to, and no cache of keys and values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...formats import BitfoldError
from ...passes import Miss
from .calibration import Batch, hooked

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Chain:
    """`hidden`: for each batch, what goes into the block that is next. `calls`: batch by batch, block by
    block, the arguments, the hidden value among them replaced by None; `exact`: the hidden values of the
    float model, if wanted."""

    paths: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    exact: list[Tensor] = field(default_factory=list)

    def run(self, block: int, batch: int) -> Tensor:
        """The block's result for the batch, from the hidden value as it is now."""
        args, kwargs = self.arguments(block, batch)
        return first_tensor(self.blocks[block](*args, **kwargs))

    def run_exact(self, block: int, batch: int) -> Tensor:
        """The block's result in the float model, if its weights are the float ones now."""
        args, kwargs = _filled(self.calls[batch][block], self.exact[batch].clone())
        return first_tensor(self.blocks[block](*args, **kwargs))

    def arguments(self, block: int, batch: int = 0) -> Call:
        """What the block is called with."""
        # A copy: a block that adds to what it is given would change what the next run of it starts from.
        return _filled(self.calls[batch][block], self.hidden[batch].clone())


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
    calls: list[Call] = []
    order: list[int] = []
    handed: list[tuple[Tensor, int]] = []
    start: list[Tensor] = []
    index = {block: i for i, block in enumerate(chain.blocks)}
    broken: list[str] = []
    returned: list[weakref.ref[Tensor]] = []
    given: list[tuple[Tensor, int]] = []

    def before(block: nn.Module, args: Any, kwargs: Any) -> None:
        value, call = _emptied(args, kwargs)
        path = chain.paths[index[block]]
        if value is None:
            broken.append(f"block {path} is given no tensor")
            return
        if not order:
            start.append(value.detach().clone())
        elif handed and (handed[-1][0] is not value or handed[-1][1] != _version(value)):
            broken.append(f"block {path} is not given what the one before it returned")
        others = pytree.tree_leaves(call, is_leaf=_is_cache)
        given[:] = [(one, _version(one)) for one in others if isinstance(one, Tensor)]
        if any(ref() is one for ref in returned for one, _ in given):
            broken.append(f"block {path} is given more than one result of the blocks before it")
        if any(_is_cache(one) for one in others):
            broken.append(
                f"block {path} is given a cache, which each run of it would add to (use_cache=False)"
            )
        order.append(index[block])
        calls.append(call)

    def after(block: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        first = first_tensor(result)
        handed[:] = [(first, _version(first))]
        returned.extend(weakref.ref(one) for one in pytree.tree_leaves(result) if isinstance(one, Tensor))
        if any(_version(one) != version for one, version in given):
            broken.append(
                f"block {chain.paths[index[block]]} writes to what it is given beside the first tensor"
            )

    with hooked(model, dict.fromkeys(chain.blocks, before), dict.fromkeys(chain.blocks, after)):
        batch.run(model)
    if broken:
        return broken[0]
    if order != list(range(len(chain.blocks))):
        return "its blocks do not each run once, in order"
    chain.hidden.append(start[0])
    chain.calls.append(calls)
    return ""


def _version(value: Tensor) -> int:
    """How often it was written to; tensors of inference mode do not count that."""
    return 0 if value.is_inference() else value._version


def _is_cache(value: Any) -> bool:
    """transformers' caches: objects that blocks hand their keys and values to."""
    return callable(getattr(value, "update", None)) and hasattr(value, "get_seq_length")


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
    """transformers' models, wherever in the model they are, do not fill a cache of keys and values meanwhile:
    a block run twice would add twice."""
    found = {id(config): config for module in model.modules() if (config := vars(module).get("config"))}
    asking = [config for config in found.values() if getattr(config, "use_cache", False)]
    try:
        for config in asking:
            config.use_cache = False
        yield
    finally:
        for config in asking:
            config.use_cache = True
