"""Scalars of training with fake quantization, for TensorBoard: losses, and how each rounded edge fares.

In: a fake-quantized graph and a batch. Out: per edge its signal to noise, the part of its values beyond the
codes, and its largest value; written where TensorBoard reads them, by its own writer. Needs tensorboard.

    with Scalars("runs/int8") as log:
        for step, batch in enumerate(batches):
            loss = train(gm, batch)
            log.write(step, {"loss": loss})
            if step % 100 == 0:
                log.rounding(step, gm, batch)

    rounding(gm, batch)["layers.0.down/weight/sqnr_db"]   ->   38.4
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..formats import BitfoldError, format
from ..passes.edges import edge
from .held import as_it_was
from .viz.activations import quantized
from .viz.watch import Watched

FAKE_QUANTIZE = torch.ops.bitfold.fake_quantize.default


def rounding(gm: GraphModule, inputs: Sequence[Any]) -> dict[str, float]:
    """`layer/edge/figure` -> number, of each fake-quantize node on these inputs. Runs the graph once, without
    gradients; statistics and random numbers stay as they were, so that who looks trains alike. BitfoldError
    if nothing in the graph is fake-quantized."""
    found: dict[str, float] = {}
    values: dict[Node, Any] = {}

    def see(node: Node, value: Any, _: Any) -> None:
        values[node] = value
        if node.target is not FAKE_QUANTIZE:
            return
        x, text, params = node.args[0], str(node.args[1]), node.args[2] if len(node.args) > 2 else None
        on = edge(node)
        held = [values[one] for one in params] if isinstance(params, list | tuple) else None
        given = values[x] if isinstance(x, Node) else None
        if not isinstance(given, Tensor) or given.numel() == 0:
            return
        flow = quantized(given, text, format(text).quantize(given, held).parts)
        name = f"{on.layer}/{on.which}" if on is not None else node.name
        found[f"{name}/sqnr_db"] = flow.sqnr_db
        found[f"{name}/clipped"] = flow.clipped or 0.0
        found[f"{name}/largest"] = float(given.abs().max())

    with torch.no_grad(), as_it_was(gm, inputs):
        Watched(gm, see).run(*inputs)
    if not found:
        raise BitfoldError("nothing in this graph is fake-quantized; run the pass fake_quantize first")
    return found


class Scalars:
    """Writes scalars to a folder that TensorBoard reads. BitfoldError if tensorboard is not installed."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BitfoldError(
                "scalars are written by tensorboard: run `pip install 'bitfold[tensorboard]'`"
            ) from error
        self._writer: Any = SummaryWriter(log_dir=str(Path(folder)))

    def write(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Numbers of a step, by name; slashes in names make groups."""
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def rounding(self, step: int, gm: GraphModule, inputs: Sequence[Any]) -> None:
        """How each rounded edge fares on a batch."""
        self.write(step, rounding(gm, inputs))

    def __enter__(self) -> Scalars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
