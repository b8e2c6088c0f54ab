"""A module in words: its class, and the values, functions and tensors that it holds beside its parameters.

In: a module. Out: text that is the same in every run, and another if the module holds another value of a kind
that is known: numbers, text, dtypes, tensors, functions, lists, tuples, sets and mappings of these, and
objects with attributes of these (a configuration).

    described_module(MLP(act=F.relu, scale=2.0))   "models.MLP  {act: torch.nn.functional.relu, scale: 2.0}"

What lies deeper than a few levels, and what objects hold elsewhere than in `__dict__`, is not seen: they
stand by their class alone, and a run that was changed there is taken for the same.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module()))


def described_module(module: nn.Module) -> str:
    """Without its parameters, buffers, submodules and hooks."""
    held = {name: value for name, value in vars(module).items() if name not in _OWN}
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return f"{kind} {module.extra_repr()} {_said(held, 0)}"


def _said(value: Any, depth: int) -> str:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)} {_digest(value)}"
    if depth > 4:  # lists may hold themselves
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_said(one, depth + 1)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_said(one, depth + 1) for one in value) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(_said(one, depth + 1) for one in value)) + "}"
    if isinstance(value, functools.partial):
        return f"partial({_said((value.func, value.args, value.keywords), depth + 1)})"
    if isinstance(value, types.FunctionType):  # lambdas are told apart by what they do
        code = value.__code__
        closed = [cell.cell_contents for cell in value.__closure__ or ()]
        body = hashlib.sha256(code.co_code + repr(code.co_names).encode()).hexdigest()
        constants = [one for one in code.co_consts if not isinstance(one, types.CodeType)]
        parts = (constants, list(value.__defaults__ or ()), closed)
        return f"{value.__module__}.{value.__qualname__} {body} {_said(parts, depth + 1)}"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    if isinstance(value, enum.Enum):
        return str(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, nn.Module | type) or not hasattr(value, "__dict__"):
        return kind
    return f"{kind} {_said(vars(value), depth + 1)}"


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta or not tensor.numel():
        return ""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
