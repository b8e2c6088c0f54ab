"""A lowered program as what a user holds: a graph with tensors of its own, which stays in the mode and the
dtype that it was captured in.

In: a lowered GraphModule. Out: the same object, of a class that says in one sentence what a program cannot do
(be pickled, be cast, be put into another mode) where torch would do half of it.

    program.to("cuda"), copy.deepcopy(program), program.eval()   work
    program.to(torch.bfloat16), pickle.dumps(program)            raise
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..formats import BitfoldError
from ..passes.training.mode import trains
from .files.graph_data import Data
from .files.graph_values import enum_value
from .folded import keeping_dtype
from .install import CANONICAL, decoded_dtypes


class PickleError(BitfoldError, pickle.PicklingError):
    """Somebody pickles a program."""


class Program(GraphModule):
    """What is added to the class of a graph."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise PickleError(
            "a quantized program cannot be pickled; write it by bf.save(program, path) and read it by "
            "bf.load(path)"
        )

    def __copy__(self) -> GraphModule:
        return as_program(super().__copy__())

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:
            was, wanted = ("train", "eval") if self.training else ("eval", "train")
            raise BitfoldError(
                f"this program was captured in {was} mode and stays in it; call model.{wanted}() before "
                "bf.quantize(model, ..., scope='program')"
            )
        return self

    def eval(self) -> Any:
        return self.train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for dtype in _computed_in(self.meta[CANONICAL].graph):
            new = fn(torch.empty(0, dtype=dtype)).dtype
            if new != dtype:
                raise BitfoldError(
                    f"this program was captured in {dtype} and cannot be cast to {new}; cast the model, and "
                    "then quantize it: bf.quantize(model.to(dtype), ..., scope='program')"
                )
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]


def as_program(gm: GraphModule) -> GraphModule:
    """Make `gm`, which holds its canonical graph in its meta, a program, in place."""
    for method in ("train", "eval"):  # set on the instance by torch.export, where they raise
        gm.__dict__.pop(method, None)
    gm.training = any(trains(node) for node in gm.graph.nodes)
    gm.__class__ = type("GraphModuleImpl", (Program, type(gm)), {})
    return gm


def own_tensors(gm: GraphModule, model: nn.Module) -> None:
    """Part the program from the model that it was captured from.

    Parameters are others over the same memory, so that moving the program does not move the model's. Buffers
    are copied: a graph in train mode writes to them.
    """
    theirs = {id(buffer) for buffer in model.buffers()}
    made: dict[int, Tensor] = {}
    for module in gm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), new)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in theirs:
                module._buffers[name] = made.setdefault(id(buffer), buffer.detach().clone())


def _computed_in(graph: Data) -> set[torch.dtype]:
    """The dtypes of float inputs and of decoded weights."""
    inputs = {node["val"]["dtype"] for node in graph["nodes"] if "dtype" in (node.get("val") or {})}
    dtypes = {*decoded_dtypes(graph).values(), *(enum_value("dtype", name) for name in inputs)}
    return {dtype for dtype in dtypes if dtype.is_floating_point}
