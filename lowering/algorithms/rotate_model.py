"""A model whose residual stream is rotated, for as long as an algorithm works on it.

In: a model, its sites, a batch, `Rotate`. Out: rotated weights in place of the model's, as drafts on the
anchors of those that take codes; and new values for the parameters that take none.

    embed E R;  norms 1;  q, k, v, gate, up: W diag(g) R;  o, down: R^T W;  head W diag(g) R

Beside the model that is a second copy of its weights, until they are folded. An embedding that is the head's
weight too becomes a parameter of its own, since the head takes the last norm's vector in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...formats import BitfoldError
from ...passes import Miss, capture, expression
from ...passes.algorithms.draft import DRAFT, Draft
from ...passes.algorithms.residual import Stream, residual
from ...passes.algorithms.rotate import Rotate
from ...passes.anchors import TARGETS
from ...passes.note import annotated
from ...passes.observing.batch import Batch
from ...passes.scopes.module import is_stock
from ...passes.scopes.program import CaptureError
from ..module_scope import Site
from ..outputs import first_output
from ..parameters import parameter_names
from ..swaps import Swaps
from ..turned import turn
from .places import Whole, work

# Relative to the result's norm: every linear's weight and every sum of the stream is rounded anew.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@work.register
def rotate_model(step: Rotate, at: Whole) -> None:
    """Rotate, until the swaps end. Raises BitfoldError, naming the operator, for a model that is not to be
    rotated, and if it computes something else afterwards."""
    model, batch = at.model, at.batches[0]
    turned = _Turning(step, model, at.sites, at.swaps, _stream(model, batch))
    before = first_output(model, batch)
    turned.rotate()
    after = first_output(model, batch)
    apart = float((after - before).float().norm() / before.float().norm().clamp(min=1e-12))
    if not apart <= TOLERANCE.get(before.dtype, 1e-2):
        raise BitfoldError(
            f"{type(model).__name__} computes something else when its residual stream is rotated (by "
            f"{apart:.1e}); leave rotate out for this model"
        )
    if step.online:
        turned.turn_writers()
    at.changes |= turned.changes


def _stream(model: nn.Module, batch: Batch) -> Stream:
    try:
        found = residual(capture(model, batch.args, kwargs=batch.kwargs))
    except CaptureError as error:
        raise BitfoldError(f"rotate looks at the whole model's graph: {error}") from error
    if isinstance(found, Miss):
        raise BitfoldError(f"{type(model).__name__} cannot be rotated: {found.reason}")
    return found


class _Turning:
    """The parameters of a model while they are turned."""

    def __init__(
        self, step: Rotate, model: nn.Module, sites: Sequence[Site], swaps: Swaps, stream: Stream
    ) -> None:
        self.step, self.model, self.stream, self.swaps = step, model, stream, swaps
        self.changes: dict[str, Tensor] = {}
        self.names = parameter_names(model)
        self.anchors = {}
        for site in sites:
            for node, note in annotated(site.gm):
                operand = node.args[TARGETS[node.target][2]]
                chain = expression(site.gm, operand) if isinstance(operand, torch.fx.Node) else None
                if chain is not None and not chain.text and note.weight:
                    self.anchors[chain.path] = site, node, note

    def rotate(self) -> None:
        """Every parameter of the stream."""
        stream = self.stream
        first = self.model.get_parameter(stream.embeddings[0])
        turn = self.step.matrix(stream.width, first.device)
        vectors = {path: self._wide(path) for path in stream.norms}
        new: dict[str, Tensor] = {}
        for path in stream.embeddings:
            for name in self._only(path, table=True):
                new[name] = self._wide(path) @ turn
        for path, norm in stream.readers.items():
            w = self._wide(path)
            for name in self._only(path, table=False):
                new[name] = (w if norm is None else w * vectors[norm]) @ turn
        for path, bias in stream.writers.items():
            for name in self._only(path, table=False):
                new[name] = turn.mT @ new.get(name, self._wide(path))
            if bias is not None:
                new[bias] = self._wide(bias) @ turn
        new |= {path: torch.ones_like(value) for path, value in vectors.items()}
        for path, value in new.items():
            self._put(path, value)

    def turn_writers(self) -> None:
        """The transform before linears that write into the stream, and its inverse in their codes."""
        for path in self.stream.writers:
            if path not in self.anchors:
                continue
            site, node, note = self.anchors[path]
            draft = node.meta[DRAFT]
            if note.anchor == "linear" and is_stock(site.module):
                turn(site.gm, node)
                node.meta[DRAFT] = Draft(torch.ops.bitfold.hadamard(draft.weight))

    def _wide(self, path: str) -> Tensor:
        return self.model.get_parameter(path).detach().double()

    def _only(self, path: str, *, table: bool) -> list[str]:
        """The names of a parameter that are embeddings', or that are not: tied, it is both."""
        names = self.names[id(self.model.get_parameter(path))]
        if len(names) == 1:
            return names
        tables = [
            name
            for name in names
            if isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        ]
        found = tables if table else [name for name in names if name not in tables]
        if tables and len(tables) < len(names) and any(name in self.anchors for name in names):
            raise BitfoldError(
                f"{names[0]} is the weight of {' and '.join(names)}, which take different numbers when "
                "rotated, and the recipe gives it codes; untie them first, or let the recipe skip it"
            )
        return found

    def _put(self, path: str, value: Tensor) -> None:
        prefix, _, own = path.rpartition(".")
        owner = self.model.get_submodule(prefix)
        held = owner.get_parameter(own)
        if path in self.anchors and self.anchors[path][2].stored:
            raise BitfoldError(
                f"{path} has codes of its own (stored), which cannot be rotated; leave rotate out, or stored"
            )
        stored = value.to(held.dtype)
        if path in self.anchors:
            # One tensor for both where the model is in float32.
            self.anchors[path][1].meta[DRAFT] = Draft(
                stored if stored.dtype == torch.float32 else value.float()
            )
        else:
            self.changes[path] = stored
        self.swaps.replace(owner, own, stored)
