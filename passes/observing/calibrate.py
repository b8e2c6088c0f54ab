"""Calibrate: run data through an observed graph, so that its observers know the ranges.

In: an observed graph and batches as the captured model takes them. Out: the number of batches; the
observers filled.

    Pipeline.parse("annotate{recipe=int8_static},observe").run(gm)
    calibrate(gm, batches)
    Pipeline.parse("fold").run(gm)

Every batch is checked against the graph's inputs, and for NaN, before the first one runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ...formats import BitfoldError
from ..core import Progress, state
from ..stages import Stage
from .observers import finite

NO_BATCHES = "calibration has no batches; give at least one"


def calibrate(gm: GraphModule, batches: Iterable[Any], progress: Progress | None = None) -> int:
    """Run every batch (a tensor, a tuple of arguments, or a dict of keywords) without gradients.

    Returns the number of batches. Raises BitfoldError, before anything runs, for a graph without observers,
    for no batches at all, and for a batch of the wrong shape or dtype, or with NaN or infinity in it; and,
    naming the layer, for NaN or infinity that comes up inside the model.
    """
    if state(gm).stage is not Stage.observed:
        raise BitfoldError(
            f"calibrate takes an observed graph, and this one is {state(gm).stage.name}; run observe first"
        )
    given = [_arguments(batch) for batch in batches]
    if not given:
        raise BitfoldError(NO_BATCHES)
    inputs = gm.graph.find_nodes(op="placeholder")
    for index, (args, kwargs) in enumerate(given):
        _check(index, inputs, _flat(gm, index, args, kwargs, len(inputs)))
    with torch.no_grad():
        for index, (args, kwargs) in enumerate(given):
            if progress is not None:
                progress(f"calibrate on batch {index}", index, len(given))
            with named(f"calibration batch {index}"):
                gm(*args, **kwargs)
    if progress is not None:
        progress("calibrated", len(given), len(given))
    return len(given)


@contextmanager
def named(batch: str) -> Iterator[None]:
    """What an observer refuses is said of this batch."""
    try:
        yield
    except BitfoldError as error:
        raise BitfoldError(f"{batch}: {error}") from error


def usable(value: Tensor) -> bool:
    """Whether these are numbers to calibrate on: finite, or a mask of attention, which is 0 or -infinity."""
    if not value.numel() or finite(value):
        return True
    shown = value == 0
    return bool(shown.any()) and bool((shown | (value == -math.inf)).all())


def flat_arguments(gm: GraphModule, index: int, batch: Any) -> list[Any]:
    """The values of a batch in the order of the graph's inputs, checked as `calibrate` checks them."""
    inputs = gm.graph.find_nodes(op="placeholder")
    values = _flat(gm, index, *_arguments(batch), len(inputs))
    _check(index, inputs, values)
    return values


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return tuple(batch), {}
    return (batch,), {}


def _flat(
    gm: GraphModule, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], count: int
) -> list[Any]:
    """The batch's values in the order of the graph's inputs."""
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is not None and info.in_spec is not None and info.in_spec.num_children == 2:
        order = info.in_spec.children()[1].context
        if set(order) != set(kwargs):
            raise BitfoldError(
                f"calibration batch {index} has the keywords {sorted(kwargs)}, and the graph was captured "
                f"with {sorted(order)}; give batches as the inputs were given to capture"
            )
        kwargs = {name: kwargs[name] for name in order}
    flat: list[Any] = pytree.tree_leaves((args, kwargs))
    if len(flat) != count:
        raise BitfoldError(f"calibration batch {index} has {len(flat)} inputs, and the graph takes {count}")
    return flat


def _check(index: int, inputs: Sequence[Node], values: Sequence[Any]) -> None:
    for node, value in zip(inputs, values, strict=True):
        wanted = node.meta.get("val")
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(value, Tensor):
            raise BitfoldError(f"calibration batch {index}: input {node.name!r} is {value!r}, not a tensor")
        if value.dtype != wanted.dtype:
            raise BitfoldError(
                f"calibration batch {index}: input {node.name!r} is {value.dtype}, not {wanted.dtype}"
            )
        if not _fits(value, wanted):
            raise BitfoldError(
                f"calibration batch {index}: input {node.name!r} has shape {list(value.shape)}, and "
                f"the graph was captured for [{', '.join(map(str, wanted.shape))}]"
            )
        if value.is_floating_point() and not usable(value):
            raise BitfoldError(
                f"calibration batch {index}: input {node.name!r} has NaN or infinity in it; remove it"
            )


def _fits(value: Tensor, wanted: Tensor) -> bool:
    """Sizes that the capture left open fit any."""
    return value.ndim == wanted.ndim and all(
        not isinstance(want, int) or want == size
        for size, want in zip(value.shape, wanted.shape, strict=True)
    )
