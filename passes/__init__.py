"""Passes: graph in, graph out, verified after.

Comes in: a model (`capture`) and a pipeline's text. Goes out: the rewritten graph and its trace.

    gm = capture(model, inputs); trace = Pipeline.parse("annotate{recipe=int4},fold").run(gm)
"""

from .capture import CaptureError, capture, capture_frame, capture_module, example_for, is_training_graph
from .constants import (
    Expression,
    add_constant,
    constant,
    constant_nodes,
    erase_dead_constants,
    expression,
    is_parameter_expr,
    source_parameter,
)
from .core import Miss, MissRecord, Pass, State, WeightStore, report, state
from .edit import call, fake_mode, replace
from .pipeline import Pipeline
from .provenance import Origin, inherit, origin
from .registry import find_pass, pass_names, register_pass
from .stages import Stage, VerificationError, verify
from .trace import Change, GraphSnapshot, NodeSnapshot, Step, Trace, snapshot

__all__ = [
    "CaptureError",
    "Change",
    "Expression",
    "GraphSnapshot",
    "Miss",
    "MissRecord",
    "NodeSnapshot",
    "Origin",
    "Pass",
    "Pipeline",
    "Stage",
    "State",
    "Step",
    "Trace",
    "VerificationError",
    "WeightStore",
    "add_constant",
    "call",
    "capture",
    "capture_frame",
    "capture_module",
    "constant",
    "constant_nodes",
    "erase_dead_constants",
    "example_for",
    "expression",
    "fake_mode",
    "find_pass",
    "inherit",
    "is_parameter_expr",
    "is_training_graph",
    "origin",
    "pass_names",
    "register_pass",
    "replace",
    "report",
    "snapshot",
    "source_parameter",
    "state",
    "verify",
]
