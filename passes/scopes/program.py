"""Program scope: a model and example inputs to one graph of operators, by `torch.export`.

Comes in: an `nn.Module` and its inputs. Goes out: a `GraphModule` at stage `captured`, normalized:
pre-dispatch ATen operators, parameters as `get_attr`, fake values with symbolic sizes, the origin of each
node.

    gm = capture(model, (tokens,), dynamic="batch")
    gm.graph:  linear: f32[s0, 32] = aten.linear.default(x, fc_weight, fc_bias)
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ...formats.errors import BitfoldError
from ..core import State, state
from ..normalize import Normalize
from ..provenance import breaking_point
from ..verify import verify
from .frame import capture_frame, is_training_graph
from .module import capture_module, example_for

__all__ = ["CaptureError", "capture", "capture_frame", "capture_module", "example_for", "is_training_graph"]

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]

_CONVENIENCE = {"batch": (0,), "sequence": (1,), "batch+sequence": (0, 1)}


class CaptureError(BitfoldError):
    """The model cannot be captured as one graph."""


def traceable(given: Any) -> Any:
    """The same; with tensors that were made in inference mode copied, each once, if there are any: no graph
    may be recorded of those."""
    leaves = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    with torch.inference_mode(False):
        copies = {id(leaf): leaf.clone() for leaf in leaves if leaf.is_inference()}
    if not copies:
        return given
    return pytree.tree_map_only(Tensor, lambda leaf: copies.get(id(leaf), leaf), given)


def capture(
    model: nn.Module,
    inputs: Inputs,
    *,
    scope: str = "program",
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Any = None,
) -> GraphModule:
    """The whole of `model` as one normalized graph that shares the model's parameters.

    `inputs`: a tensor, a tuple of arguments, or a mapping of keyword arguments. `dynamic`: which sizes may
    vary: "batch" (dimension 0 of every tensor), "sequence" (dimension 1), "batch+sequence", or anything that
    `torch.export` takes as `dynamic_shapes`. The model is captured in the mode it is in (`train_mode` flips
    it).

    Raises CaptureError (a BitfoldError) when the model cannot be captured, BitfoldError for a wrong argument.
    """
    if scope != "program":
        raise BitfoldError(
            f"capture() takes scope='program', not '{scope}'; the frame scope is "
            "torch.compile(backend='bitfold') and the module scope is bf.quantize"
        )
    args, named = traceable(_arguments(inputs, kwargs))
    shapes, args, named = _dynamic(model, dynamic, args, named)
    gm = _export(model, args, named, shapes)
    gm.meta.pop("bitfold", None)
    gm.meta["bitfold"] = State("program")
    state(gm)
    Normalize().apply(gm)
    gm.recompile()
    verify(gm, state(gm).stage, after="capture")
    return gm


def _arguments(inputs: Inputs, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named = dict(kwargs or {})
    if isinstance(inputs, Tensor):
        return (inputs,), named
    if isinstance(inputs, Mapping):
        return (), {**inputs, **named}
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(inputs), named
    raise BitfoldError(
        f"inputs is a {type(inputs).__name__}; give a tensor, a tuple of them, or a dict of keywords"
    )


def _dynamic(
    model: nn.Module, dynamic: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What `torch.export` wants to know of sizes that vary, and inputs that it can learn it from."""
    if not isinstance(dynamic, str):
        return dynamic, args, named
    if dynamic not in _CONVENIENCE:
        raise BitfoldError(
            f"dynamic is '{dynamic}'; it may be {', '.join(map(repr, _CONVENIENCE))}, "
            "or dynamic_shapes as torch.export takes them"
        )
    dims = _CONVENIENCE[dynamic]
    args, named = pytree.tree_map_only(Tensor, lambda given: _widened(given, dims), (args, named))
    # DYNAMIC, not AUTO: a size that the model fixes is an error then, not a quiet specialization.
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for given in pytree.tree_leaves((args, named)):
        if isinstance(given, Tensor):
            shapes[given] = {dim: Dim.DYNAMIC for dim in dims if dim < given.dim()}
    try:
        return shapes.dynamic_shapes(model, args, named), args, named  # type: ignore[no-untyped-call]
    except TypeError as error:
        raise BitfoldError(f"the inputs do not fit {type(model).__name__}.forward: {error}") from error


def _widened(given: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The same data with size 2 where a varying size is 1, which `torch.export` takes for a constant."""
    for dim in dims:
        if dim < given.dim() and given.shape[dim] == 1:
            given = given.repeat_interleave(2, dim)
    return given


def _export(model: nn.Module, args: tuple[Any, ...], named: dict[str, Any], shapes: Any) -> GraphModule:
    try:
        program = torch.export.export(model, args, named, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured as one program, it breaks at {breaking_point(error)} "
            "(bf.quantize with scope='module' needs no whole graph)"
        ) from error
    try:
        return program.module(check_guards=False)
    except SyntaxError as error:
        # The graph's code spells each path as Python, and torch quotes only some of the names that need it.
        raise CaptureError(
            f"{type(model).__name__} cannot be captured as one program: the name {_unspeakable(model)!r} in "
            "it cannot be written as Python; rename it (bf.quantize with scope='module' needs no whole graph)"
        ) from error


def _unspeakable(model: nn.Module) -> str:
    """The first name that is a keyword or holds what ends a string."""
    paths = (path for path, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers()))
    names = dict.fromkeys(name for path in paths for name in path.split("."))
    return next((name for name in names if keyword.iskeyword(name) or set(name) & set('"\\\n')), "")
