"""A trace, and all else that is known of it, as one HTML page: what each pass changed, missed, and why;
errors, times, kernels, tensors; two traces side by side.

Comes in: a `Trace`, an `Inspection`, a graph, a module or a compiled function. Goes out: one file that opens
from disk.

    trace = Pipeline.parse("annotate{recipe=int4},fold,fuse").run(gm)
    viz(trace, "trace.html", errors=node_errors(reference, gm, inputs))
    viz(inspect(model, pipeline, inputs), "all.html", other=inspect(model, another, inputs))
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text_file import write_text
from .data import Json, page_data
from .errors import NodeError, node_errors
from .overlay import overlay_data
from .page import render
from .subject import Subject, subject

if TYPE_CHECKING:
    from ..inspection import Inspection
    from ..pareto import Point

__all__ = ["NodeError", "node_errors", "page_text", "viz"]


def viz(
    thing: Any,
    path: str | os.PathLike[str],
    *,
    errors: Mapping[str, NodeError] | None = None,
    title: str | None = None,
    inputs: Sequence[Any] | None = None,
    other: Any = None,
    other_title: str | None = None,
    pareto: Sequence[Point] = (),
) -> Path:
    """Write the page of `thing` to `path` and return the path.

    errors: of a trace, from `node_errors`; inputs: to call a module or a compiled function with; other: a
    second thing of the same model, drawn beside it. Raises BitfoldError for something that cannot be drawn,
    an empty trace, or a place that cannot be written."""
    text = page_text(
        thing,
        errors=errors,
        title=title,
        inputs=inputs,
        other=other,
        other_title=other_title,
        pareto=pareto,
    )
    return write_text(path, text)


def page_text(
    thing: Any,
    *,
    errors: Mapping[str, NodeError] | None = None,
    title: str | None = None,
    inputs: Sequence[Any] | None = None,
    other: Any = None,
    other_title: str | None = None,
    pareto: Sequence[Point] = (),
) -> str:
    """The same page as text."""
    data = _data(subject(thing, inputs), errors, title)
    # An exact result has no error to plot.
    data["pareto"] = [point.as_json() for point in pareto if math.isfinite(point.sqnr_db)]
    if other is not None:
        data["other"] = _data(subject(other, inputs), None, other_title)
    return render(data)


def _overlays(found: Inspection, *, explained: bool) -> Json:
    from ..explain import explain

    findings = explain(found).findings if explained else ()
    told = [{"node": f.node, "text": str(f), "remedy": f.remedy, "weight": f.weight} for f in findings]
    return overlay_data(found) | {"findings": told}


def _data(given: Subject, errors: Mapping[str, NodeError] | None, title: str | None) -> Json:
    overlays = None if given.inspection is None else _overlays(given.inspection, explained=given.explained)
    data = page_data(given.trace, errors=errors or given.errors, title=title, overlays=overlays)
    if given.graphs > 1:
        data["summary"] += f" · the largest of {given.graphs} graphs"
    return data
