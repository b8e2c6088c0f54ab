"""A model while it is measured: in eval mode, without gradients, each run from the same buffers.

In: a model, and hooks for some of its modules. Out: the same model, meanwhile at rest, with these hooks;
then as it was.

    with at_rest(model): model(x); model(x)                                  both start from the same state
    with hooked(model, {model.fc: look}): model(x)                           look(fc, args, kwargs) is called
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .buffers import Buffers


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Every call of the model meanwhile starts from the buffers that it has now."""
    training = {module: module.training for module in model.modules()}
    buffers = Buffers(model)

    def back(*_: object) -> None:
        if not torch.compiler.is_compiling():  # a capture must not have it in its graph
            buffers.back()

    handle = model.register_forward_pre_hook(back, prepend=True) if len(buffers) else None
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        if handle is not None:
            handle.remove()
        buffers.back()
        for module, mode in training.items():
            module.training = mode


@contextmanager
def hooked(
    model: nn.Module,
    before: Mapping[nn.Module, Callable[..., Any]],
    after: Mapping[nn.Module, Callable[..., Any]] | None = None,
    *,
    outside: bool = False,
) -> Iterator[None]:
    """The model at rest, with these hooks around the forwards.

    They see what the forwards themselves are given and return, or, if `outside`, what the modules are called
    with and hand on: the user's own hooks, which go on working, lie between the two.
    """
    with at_rest(model):
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True, prepend=outside)
            for module, hook in before.items()
        ]
        handles += [
            module.register_forward_hook(hook, with_kwargs=True, prepend=not outside)
            for module, hook in (after or {}).items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def in_order(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call in the order of the signature, which is how a module's graph takes them."""
    return inspect.signature(module.forward).bind(*args, **kwargs).args if kwargs else args
