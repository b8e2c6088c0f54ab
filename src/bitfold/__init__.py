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
    from .formats.gradient import Gradient
    from .lowering.convert import convert
    from .lowering.distill import Distill, distillation
    from .lowering.load import load
    from .lowering.prepare import prepare_qat
    from .lowering.qat_options import Qat
    from .lowering.qat_schedule import advance, parameter_groups
    from .lowering.quantize import quantize
    from .lowering.report import Report, report
    from .lowering.save import save
    from .lowering.target import Target, get_target, register_target
    from .passes import Miss, Pass, Pipeline, Trace, capture, register_pass
    from .passes.calibrate import calibrate
    from .passes.recipes import Recipe
    from .passes.rules import Rule
    from .tools.viz import viz

# Public name -> (module, name there), imported when first asked for.
_LATER = {
    "Distill": ("lowering.distill", "Distill"),
    "Gradient": ("formats.gradient", "Gradient"),
    "Miss": ("passes", "Miss"),
    "Pass": ("passes", "Pass"),
    "Pipeline": ("lowering", "Pipeline"),
    "Recipe": ("passes.recipes", "Recipe"),
    "Report": ("lowering.report", "Report"),
    "Rule": ("passes.rules", "Rule"),
    "Target": ("lowering.target", "Target"),
    "Trace": ("passes", "Trace"),
    "Qat": ("lowering.qat_options", "Qat"),
    "advance": ("lowering.qat_schedule", "advance"),
    "calibrate": ("passes.calibrate", "calibrate"),
    "capture": ("passes", "capture"),
    "convert": ("lowering.convert", "convert"),
    "distillation": ("lowering.distill", "distillation"),
    "get_target": ("lowering.target", "get_target"),
    "load": ("lowering.load", "load"),
    "parameter_groups": ("lowering.qat_schedule", "parameter_groups"),
    "prepare_qat": ("lowering.prepare", "prepare_qat"),
    "quantize": ("lowering.quantize", "quantize"),
    "register_format": ("formats", "register"),
    "register_pass": ("passes", "register_pass"),
    "register_target": ("lowering.target", "register_target"),
    "report": ("lowering.report", "report"),
    "save": ("lowering.save", "save"),
    "viz": ("tools.viz", "viz"),
}

__all__ = [
    "BitfoldError",
    "Distill",
    "Format",
    "FormatError",
    "Gradient",
    "Miss",
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
    "convert",
    "distillation",
    "format",
    "formats",
    "get_target",
    "load",
    "parameter_groups",
    "prepare_qat",
    "quantize",
    "register_format",
    "register_pass",
    "register_target",
    "report",
    "save",
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
