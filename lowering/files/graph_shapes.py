"""Symbolic sizes of a graph as data, and the fake values of every node made again from them.

In: `meta["val"]` of the inputs. Out: their dtypes and shapes with symbols by name, and each symbol's range;
and back: a fresh shape environment with one symbol for each name, fake inputs of those sizes, and the value
of every node that follows from them.

    FakeTensor(float32, (s77, 64))   <->   {"dtype": "float32", "shape": ["s77", 64], "device": "cpu"}

Sizes that were equal stay equal and sizes that were not stay apart: a size is known by its expression's text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from ...passes import Stage, state
from .graph_values import GraphDataError, enum_value

_LARGEST = 2**62


class Symbols:
    """Collects the symbols that the inputs' sizes are made of."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, int | None]] = {}
        self._renamed: dict[Any, Any] = {}

    def value(self, value: Any) -> Any:
        """One input's `meta["val"]` as data."""
        if isinstance(value, Tensor):
            return {
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": [self._size(size) for size in value.shape],
                "device": str(value.device),
            }
        if isinstance(value, torch.SymInt):
            return {"size": self._size(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return {"constant": value}
        raise GraphDataError(f"an input is a {type(value).__name__}, which cannot be saved")

    def data(self) -> dict[str, Any]:
        """Hint and range of each symbol."""
        return self._found

    def _size(self, size: int | torch.SymInt) -> int | str:
        if not isinstance(size, torch.SymInt) or size.node.is_constant():
            return int(size)
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        # Numbered in the order of use, so that saving what was loaded gives the same file.
        for symbol in sorted(expression.free_symbols, key=str):
            self._renamed.setdefault(symbol, type(symbol)(f"s{len(self._renamed)}", integer=True))
        text = str(expression.xreplace(self._renamed))
        if text not in self._found:
            bound = size.node.shape_env.bound_sympy(expression)
            low, high = _finite(bound.lower), _finite(bound.upper)
            self._found[text] = {"hint": size.node.hint, "min": low, "max": high}
        return text


def restore_values(gm: GraphModule, data: dict[str, Any], device: torch.device | None = None) -> None:
    """Give every node of `gm` its `meta["val"]`, on fresh symbols, and the graph its State.

    `device` takes the place of the inputs' own.
    """
    environment = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    sizes = {text: _symbol(environment, text, about) for text, about in data.get("symbols", {}).items()}
    saved = {entry["name"]: entry.get("val") for entry in data["nodes"]}
    names = [entry["name"] for entry in data["nodes"]]
    inputs: list[Any] = []
    for node, name in zip(gm.graph.nodes, names, strict=True):
        if node.op == "placeholder":
            inputs.append(_fake_input(mode, saved[name], sizes, device))
    with torch.no_grad():
        _Propagate(gm, mode).run(*inputs)
    here = state(gm)
    here.scope = data.get("scope", "program")
    here.stage = Stage.folded
    here.fake_mode = mode


class _Propagate(Interpreter):
    """Runs a graph on fakes and keeps each node's value."""

    def __init__(self, gm: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.mode = mode

    def run_node(self, n: Node) -> Any:
        if n.op == "output":
            return super().run_node(n)
        with self.mode:
            value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = self.mode.from_tensor(value, static_shapes=True)
        if n.op == "call_module":
            # A region has a graph of its own, whose nodes want their values as much.
            inner = self.fetch_attr(str(n.target))
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            _Propagate(inner, self.mode).run(*args, **kwargs)
        if not isinstance(value, GraphModule):
            n.meta["val"] = value
        return value


def _symbol(environment: ShapeEnv, text: str, about: dict[str, Any]) -> Any:
    source = ConstantSource(f"saved size {text}")
    hint = about.get("hint")
    low, high = about.get("min"), about.get("max")
    hint = int(hint) if hint is not None else max(int(low or 0), 2)
    symbol = environment.create_symbol(hint, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
    size = environment.create_symintnode(symbol, hint=hint, source=source)
    environment._constrain_range_for_size(symbol, low, high)
    return size


def _fake_input(mode: FakeTensorMode, saved: Any, sizes: dict[str, Any], device: torch.device | None) -> Any:
    if not isinstance(saved, dict):
        raise GraphDataError("the graph in this file does not say what its inputs are")
    if "constant" in saved:
        return saved["constant"]
    if "size" in saved:
        return _size_of(saved["size"], sizes)
    shape = [_size_of(size, sizes) for size in saved["shape"]]
    with mode:
        return torch.empty(shape, dtype=enum_value("dtype", saved["dtype"]), device=device or saved["device"])


def _size_of(size: int | str, sizes: dict[str, Any]) -> Any:
    if isinstance(size, int):
        return size
    if size not in sizes:
        raise GraphDataError(f"the graph in this file uses a size {size!r} that it does not describe")
    return sizes[size]


def _finite(bound: Any) -> int | None:
    return int(bound) if bound.is_number and bound.is_finite and abs(bound) < _LARGEST else None
