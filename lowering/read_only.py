"""A decoded weight, and every view of it, as a tensor that nobody can write to.

In: the decoded weight, which is made anew whenever somebody asks for it. Out: the same numbers; a write to
them, which would be lost, raises; what is computed from them is a plain tensor.

    layer.weight.mul_(2), layer.weight.data[0] = 1, layer.weight.view(-1).zero_()   raise
    layer.weight.clone().mul_(2), layer.weight * 2                                  work

Not seen: writes that no torch function makes (into the storage, through dlpack), and `set_`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..formats import BitfoldError

# They end as writes do, and write nothing into the numbers.
_HARMLESS = ("requires_grad_", "retain_grad_")


class ReadOnly(Tensor):
    """A tensor over the numbers of a decoded weight."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(one, cls) for one in pytree.tree_leaves(_written(func, args, kwargs))):
            raise BitfoldError(
                "this weight is decoded from its codes on demand and writing to it would be lost (an adapter "
                "cannot be merged into it); keep the adapter unmerged, or merge it before bf.quantize, or "
                "write to a copy, weight.clone()"
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        given = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, cls)]
        if type(found) in (tuple, list):  # of split, unbind, chunk
            return type(found)(_guarded(one, given) for one in found)
        return _guarded(found, given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = twin = self.clone()
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _written(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The arguments that a call writes to."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    if in_place or name in ("__set__", "__setitem__"):
        return [args[:1] or list(kwargs.values()), kwargs.get("out")]  # torch.nn.init passes names
    return kwargs.get("out")


def _guarded(found: Any, given: list[ReadOnly]) -> Any:
    """What a call gave: read-only too if it lies in the memory of what was read-only."""
    if isinstance(found, Tensor):
        alias: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]
        shared = any(alias(found, one) for one in given)
        return found.as_subclass(ReadOnly) if shared and not isinstance(found, ReadOnly) else found
    if type(found).__module__ == "numpy":
        found.setflags(write=False)
    return found
