"""A batch of data: one call of a model, checked when it is made.

In: what a user gives: a tensor, a tuple of arguments or a dict of keywords. Out: a `Batch` with a name, which
every complaint about it begins with.

    as_batch({"input_ids": ids}, "calibration batch 3").run(model)

NaN, infinity, meta tensors and empty ones are refused; what was made in inference mode is copied, since no
graph may be recorded of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...formats import BitfoldError
from ..scopes.program import traceable
from .observers import finite


@dataclass(frozen=True)
class Batch:
    """One call of the model."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        leaves = pytree.tree_flatten_with_path((self.args, self.kwargs))[0]
        nothing = not any(value.numel() for _, value in leaves if isinstance(value, Tensor))
        for path, value in leaves:
            if not isinstance(value, Tensor):
                continue
            if value.is_meta:
                raise BitfoldError(f"{self.name} has no numbers: {_place(path)} is on the meta device")
            if value.numel() == 0 and (value.is_floating_point() or nothing):
                raise BitfoldError(f"{self.name} is empty: {_place(path)} has shape {list(value.shape)}")
            if not value.is_floating_point():
                continue
            if not usable(value):
                raise BitfoldError(
                    f"{self.name} has NaN or infinity in {_place(path)}; leave it out or repair it"
                )

    def run(self, model: nn.Module) -> Any:
        """What the model returns for it. Raises BitfoldError if the model does not take it."""
        try:
            return model(*self.args, **self.kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            if isinstance(error, BitfoldError):
                raise
            shapes = [
                list(leaf.shape)
                for leaf in pytree.tree_leaves((self.args, self.kwargs))
                if isinstance(leaf, Tensor)
            ]
            first = str(error).strip().split("\n")[0]
            raise BitfoldError(
                f"{self.name} with shapes {shapes} does not go through {type(model).__name__}: {first}"
            ) from error


def as_batch(given: Any, name: str) -> Batch:
    """A batch from what a user wrote. Raises BitfoldError if it is nothing that a model is called with."""
    if isinstance(given, Tensor):
        return Batch(name, (traceable(given),), {})
    if isinstance(given, Mapping):
        return Batch(name, (), traceable(dict(given)))
    if isinstance(given, Sequence) and not isinstance(given, str):
        return Batch(name, traceable(tuple(given)), {})
    raise BitfoldError(
        f"{name} is a {type(given).__name__}; give a tensor, a tuple of arguments or a dict of keywords"
    )


def usable(value: Tensor) -> bool:
    """Whether these are numbers to calibrate on: finite, or a mask of attention, which is 0 or -infinity."""
    if not value.numel() or finite(value):
        return True
    shown = value == 0
    return bool(shown.any()) and bool((shown | (value == -math.inf)).all())


def _place(path: Any) -> str:
    which, *rest = path
    inside = pytree.keystr(tuple(rest))
    return f"argument {inside.strip('[]')}" if which.idx == 0 else f"argument {inside}"
