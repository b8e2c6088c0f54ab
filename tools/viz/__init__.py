"""The trace of a pipeline as one HTML page: each stage's graph, what each pass changed, what was missed, why.

Comes in: a `Trace`, and if wished the error of each node. Goes out: one file that opens from disk.

    trace = Pipeline.parse("annotate{recipe=int4},fold,fuse").run(gm)
    viz(trace, "trace.html", errors=node_errors(reference, gm, inputs))
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ...formats.errors import BitfoldError
from ...passes.trace import Trace
from ..text_file import write_text
from .data import page_data
from .errors import NodeError, node_errors
from .page import render

__all__ = ["NodeError", "node_errors", "viz"]


def viz(
    trace: Trace,
    path: str | os.PathLike[str],
    *,
    errors: Mapping[str, NodeError] | None = None,
    title: str | None = None,
) -> Path:
    """Write the page of `trace` to `path` and return the path. `errors` comes from `node_errors`.

    Raises BitfoldError for something that is not a trace, an empty one, or a place that cannot be written.
    """
    if not isinstance(trace, Trace):
        raise BitfoldError(
            f"viz() draws a Trace, not a {type(trace).__name__}; "
            "Pipeline.run returns one: viz(pipeline.run(gm), path)"
        )
    if not trace.steps:
        raise BitfoldError("the trace is empty: run a pipeline first, then pass what Pipeline.run returned")
    return write_text(path, render(page_data(trace, errors=errors, title=title)))
