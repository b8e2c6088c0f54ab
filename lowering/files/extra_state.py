"""What modules keep besides parameters and buffers (`get_extra_state`), as data of a file.

In: a model. Out: by the module's path, JSON data and names of tensors; and for that data, the state again,
which the module's own `set_extra_state` takes.

    norm.get_extra_state() == {"steps": 3, "mean": tensor}
    <-> {"norm": {"dict": [["steps", 3], ["mean", {"tensor": "norm._extra_state.0"}]]}}

A state is kept if it is made of numbers, texts, None, tensors, and lists, tuples and dicts of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ...formats import BitfoldError
from ..folded import original_class, own_extra_state
from .graph_values import GraphDataError, decode, encode

_LEAVES = (type(None), bool, int, float, str)


def dump_states(model: nn.Module, add: Callable[[str, Tensor], None]) -> dict[str, Any]:
    """The extra state of every module that has one. `add` puts a tensor into the file under a name.

    Raises BitfoldError for a state that no file can hold.
    """
    states = {}
    for path, module in stateful(model):
        tensors: list[Tensor] = []
        try:
            data = _dump(own_extra_state(module), tensors, f"{path}._extra_state".lstrip("."))
        except GraphDataError as error:
            raise BitfoldError(
                f"the extra state of {path or 'the model'} ({original_class(module).__name__}."
                f"get_extra_state) cannot be saved: {error}; let it be made of numbers, texts, tensors, and "
                "lists and dicts of them"
            ) from None
        for index, tensor in enumerate(tensors):
            add(f"{path}._extra_state.{index}".lstrip("."), tensor)
        states[path] = data
    return states


def stateful(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose class has an extra state of its own, folded ones by the class that they had."""
    for path, module in model.named_modules(remove_duplicate=False):
        if original_class(module).get_extra_state is not nn.Module.get_extra_state:
            yield path, module


def tensors_of(data: Any) -> Iterator[str]:
    """The names of the tensors of a state."""
    if isinstance(data, dict):
        if set(data) == {"tensor"}:
            yield data["tensor"]
        data = [part for parts in data.values() if isinstance(parts, list) for part in parts]
    if isinstance(data, list):
        for part in data:
            yield from tensors_of(part)


def load_state(data: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The state that `dump_states` wrote. Raises GraphDataError for data that is none."""
    if isinstance(data, list):
        return [load_state(part, tensor) for part in data]
    if isinstance(data, dict) and set(data) == {"tensor"}:
        return tensor(data["tensor"])
    if isinstance(data, dict) and set(data) == {"tuple"}:
        return tuple(load_state(part, tensor) for part in data["tuple"])
    if isinstance(data, dict) and set(data) == {"dict"}:
        return {load_state(key, tensor): load_state(part, tensor) for key, part in data["dict"]}
    return decode(data, {})


def _dump(value: Any, tensors: list[Tensor], stem: str) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": f"{stem}.{len(tensors) - 1}"}
    if type(value) is list:
        return [_dump(part, tensors, stem) for part in value]
    if type(value) is tuple:
        return {"tuple": [_dump(part, tensors, stem) for part in value]}
    if type(value) in (dict, OrderedDict):
        return {
            "dict": [[_dump(key, tensors, stem), _dump(part, tensors, stem)] for key, part in value.items()]
        }
    if type(value) in _LEAVES:
        return encode(value, str)
    raise GraphDataError(f"it has a {type(value).__name__} in it")
