"""bitfold: graph passes and generated kernels that make PyTorch models small and fast.

    import torch, bitfold as bf

    q = bf.quantize(model, "int4")                     # in place: codes instead of weights
    fast = torch.compile(model, backend="bitfold", options={"recipe": "int4"})
    bf.save(q, "model.safetensors"); bf.load("model.safetensors", into=skeleton)
    f = bf.format("int4[g128]"); codes = f.quantize(w)
    print(bf.report(q))

Importing bitfold registers its operators with torch and nothing else: no compiler starts, and the passes, the
targets and the tools are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _operators, formats  # noqa: F401  (registers operators)
from ._version import __version__
from .formats import BitfoldError, Format, FormatError, Quantized, format

if TYPE_CHECKING:
    from .formats import register as register_format
    from .formats.estimators import register as register_estimator
    from .formats.gradient import Gradient
    from .lowering.checkpoints.load import load_checkpoint
    from .lowering.checkpoints.save import save_checkpoint
    from .lowering.checkpoints.transformers_config import BitfoldConfig
    from .lowering.compile_program import compile_program as compile
    from .lowering.diagnose import diagnose
    from .lowering.files.load import load
    from .lowering.files.save import save
    from .lowering.qat.convert import convert
    from .lowering.qat.distill import Distill, distillation
    from .lowering.qat.options import Qat
    from .lowering.qat.prepare import prepare_qat
    from .lowering.qat.schedule import advance, parameter_groups
    from .lowering.quantize import quantize
    from .lowering.report import Report, report
    from .lowering.search.search import search
    from .lowering.target import Target, get_target, register_target
    from .passes import Miss, Pass, Pipeline, Trace, capture, register_pass
    from .passes.observing.calibrate import calibrate
    from .passes.observing.kinds import register_observer
    from .passes.observing.observers import Observer
    from .passes.recipes import Recipe
    from .passes.rules import Rule
    from .tools.explain import explain
    from .tools.inspection import inspect
    from .tools.viz import viz

# Public name -> (module, name there), imported when first asked for.
_LATER = {
    "BitfoldConfig": ("lowering.checkpoints.transformers_config", "BitfoldConfig"),
    "Distill": ("lowering.qat.distill", "Distill"),
    "Gradient": ("formats.gradient", "Gradient"),
    "Miss": ("passes", "Miss"),
    "Observer": ("passes.observing.observers", "Observer"),
    "Pass": ("passes", "Pass"),
    "Pipeline": ("lowering", "Pipeline"),
    "Qat": ("lowering.qat.options", "Qat"),
    "Recipe": ("passes.recipes", "Recipe"),
    "Report": ("lowering.report", "Report"),
    "Rule": ("passes.rules", "Rule"),
    "Target": ("lowering.target", "Target"),
    "Trace": ("passes", "Trace"),
    "advance": ("lowering.qat.schedule", "advance"),
    "calibrate": ("passes.observing.calibrate", "calibrate"),
    "capture": ("passes", "capture"),
    "compile": ("lowering.compile_program", "compile_program"),
    "convert": ("lowering.qat.convert", "convert"),
    "diagnose": ("lowering.diagnose", "diagnose"),
    "distillation": ("lowering.qat.distill", "distillation"),
    "explain": ("tools.explain", "explain"),
    "get_target": ("lowering.target", "get_target"),
    "inspect": ("tools.inspection", "inspect"),
    "load": ("lowering.files.load", "load"),
    "load_checkpoint": ("lowering.checkpoints.load", "load_checkpoint"),
    "parameter_groups": ("lowering.qat.schedule", "parameter_groups"),
    "prepare_qat": ("lowering.qat.prepare", "prepare_qat"),
    "quantize": ("lowering.quantize", "quantize"),
    "register_estimator": ("formats.estimators", "register"),
    "register_format": ("formats", "register"),
    "register_observer": ("passes.observing.kinds", "register_observer"),
    "register_pass": ("passes", "register_pass"),
    "register_target": ("lowering.target", "register_target"),
    "report": ("lowering.report", "report"),
    "save": ("lowering.files.save", "save"),
    "save_checkpoint": ("lowering.checkpoints.save", "save_checkpoint"),
    "search": ("lowering.search.search", "search"),
    "viz": ("tools.viz", "viz"),
}

__all__ = [
    "BitfoldConfig",
    "BitfoldError",
    "Distill",
    "Format",
    "FormatError",
    "Gradient",
    "Miss",
    "Observer",
    "Pass",
    "Pipeline",
    "Qat",
    "Quantized",
    "Recipe",
    "Report",
    "Rule",
    "Target",
    "Trace",
    "__version__",
    "advance",
    "calibrate",
    "capture",
    "compile",
    "convert",
    "diagnose",
    "distillation",
    "explain",
    "format",
    "formats",
    "get_target",
    "inspect",
    "load",
    "load_checkpoint",
    "parameter_groups",
    "prepare_qat",
    "quantize",
    "register_estimator",
    "register_format",
    "register_observer",
    "register_pass",
    "register_target",
    "report",
    "save",
    "save_checkpoint",
    "search",
    "viz",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'bitfold' has no attribute {name!r}")
    module, attribute = _LATER[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
