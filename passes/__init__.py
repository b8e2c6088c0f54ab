"""Passes: graph in, graph out, verified after.

Comes in: a model (`capture`) and a pipeline's text. Goes out: the rewritten graph and its trace.

    gm = capture(model, inputs); trace = Pipeline.parse("annotate{recipe=int4},fold").run(gm)
"""

from .annotate import Annotate
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
from .core import Miss, MissRecord, Pass, Progress, State, WeightStore, report, state
from .edit import argument, arguments, call, fake_mode, replace
from .fold import Fold, FoldError
from .fuse import Fuse, Region, inline, region_of
from .graph_snapshot import GraphSnapshot, NodeSnapshot, snapshot
from .note import Note, annotated, note
from .observing.calibrate import calibrate
from .observing.kinds import observer, observer_names, register_observer
from .observing.observe import Observe
from .observing.observers import Observer
from .observing.share import Share
from .pattern import Match, Pattern, rewrite
from .pipeline import Pipeline
from .provenance import Origin, inherit, origin
from .recipes import Recipe, is_head
from .registry import find_pass, pass_names, register_pass
from .rules import Rule, Site
from .scopes.program import (
    CaptureError,
    capture,
    capture_frame,
    capture_module,
    example_for,
    is_training_graph,
)
from .sparsify import Sparsify
from .stages import Stage, VerificationError
from .trace import Change, Step, Trace
from .training.fake_quantize import FakeQuantize
from .verify import verify

__all__ = [
    "Annotate",
    "CaptureError",
    "Change",
    "Expression",
    "FakeQuantize",
    "Fold",
    "FoldError",
    "Fuse",
    "GraphSnapshot",
    "Match",
    "Miss",
    "MissRecord",
    "NodeSnapshot",
    "Note",
    "Observe",
    "Observer",
    "Origin",
    "Pass",
    "Pattern",
    "Pipeline",
    "Progress",
    "Recipe",
    "Region",
    "Rule",
    "Share",
    "Site",
    "Sparsify",
    "Stage",
    "State",
    "Step",
    "Trace",
    "VerificationError",
    "WeightStore",
    "add_constant",
    "annotated",
    "argument",
    "arguments",
    "calibrate",
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
    "inline",
    "is_head",
    "is_parameter_expr",
    "is_training_graph",
    "note",
    "observer",
    "observer_names",
    "origin",
    "pass_names",
    "region_of",
    "register_observer",
    "register_pass",
    "replace",
    "report",
    "rewrite",
    "snapshot",
    "source_parameter",
    "state",
    "verify",
]
