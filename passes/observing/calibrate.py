"""Calibrate: run data through an observed graph, so that its observers know the ranges.

In: an observed graph and batches as the captured model takes them. Out: the number of batches; the
observers filled.

    Pipeline.parse("annotate{recipe=int8_static},observe").run(gm)
    calibrate(gm, batches)
    Pipeline.parse("fold").run(gm)

Every batch is checked against the graph's inputs, and for NaN, before the first one runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ...formats import BitfoldError
from ..core import Progress, state
from ..stages import Stage
from .batch import Batch, as_batch

NO_BATCHES = "calibration has no batches; give at least one"


def calibrate(gm: GraphModule, batches: Iterable[Any], progress: Progress | None = None) -> int:
    """Run every batch (a tensor, a tuple of arguments, or a dict of keywords) without gradients.

    Returns the number of batches. Raises BitfoldError, before anything runs, for a graph without observers,
    for no batches at all, and for a batch of the wrong shape or dtype, or that has no usable numbers; and,
    naming the layer, for NaN or infinity that comes up inside the model.
    """
    if state(gm).stage is not Stage.observed:
        raise BitfoldError(
            f"calibrate takes an observed graph, and this one is {state(gm).stage.name}; run observe first"
        )
    given = [
        one if isinstance(one, Batch) else as_batch(one, f"calibration batch {index}")
        for index, one in enumerate(batches)
    ]
    if not given:
        raise BitfoldError(NO_BATCHES)
    for batch in given:
        flat_arguments(gm, batch)
    with torch.no_grad():
        for index, batch in enumerate(given):
            if progress is not None:
                progress(f"calibrate on batch {index}", index, len(given))
            with named(batch.name):
                gm(*batch.args, **batch.kwargs)
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


def flat_arguments(gm: GraphModule, batch: Batch) -> list[Any]:
    """The values of a batch in the order of the graph's inputs, each of the kind that it was captured for."""
    inputs = gm.graph.find_nodes(op="placeholder")
    values = _flat(gm, batch, len(inputs))
    _check(batch.name, inputs, values)
    return values


def _flat(gm: GraphModule, batch: Batch, count: int) -> list[Any]:
    """The batch's values in the order of the graph's inputs."""
    args, kwargs = batch.args, batch.kwargs
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is not None and info.in_spec is not None and info.in_spec.num_children == 2:
        order = info.in_spec.children()[1].context
        if set(order) != set(kwargs):
            raise BitfoldError(
                f"{batch.name} has the keywords {sorted(kwargs)}, and the graph was captured "
                f"with {sorted(order)}; give batches as the inputs were given to capture"
            )
        kwargs = {name: kwargs[name] for name in order}
    flat: list[Any] = pytree.tree_leaves((args, kwargs))
    if len(flat) != count:
        raise BitfoldError(f"{batch.name} has {len(flat)} inputs, and the graph takes {count}")
    return flat


def _check(batch: str, inputs: Sequence[Node], values: Sequence[Any]) -> None:
    for node, value in zip(inputs, values, strict=True):
        wanted = node.meta.get("val")
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(value, Tensor):
            raise BitfoldError(f"{batch}: input {node.name!r} is {value!r}, not a tensor")
        if value.dtype != wanted.dtype:
            raise BitfoldError(f"{batch}: input {node.name!r} is {value.dtype}, not {wanted.dtype}")
        if not _fits(value, wanted):
            raise BitfoldError(
                f"{batch}: input {node.name!r} has shape {list(value.shape)}, and "
                f"the graph was captured for [{', '.join(map(str, wanted.shape))}]"
            )


def _fits(value: Tensor, wanted: Tensor) -> bool:
    """Sizes that the capture left open fit any."""
    return value.ndim == wanted.ndim and all(
        not isinstance(want, int) or want == size
        for size, want in zip(value.shape, wanted.shape, strict=True)
    )
