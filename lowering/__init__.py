"""From a folded graph to something that runs: targets, the torch.compile backend, quantize, save and load.

In: a model, or a folded graph. Out: the model on codes, a lowered graph, a compiled function, a file.

    quantize(model, "int4"); save(model, path); load(path, into=skeleton); report(model)
"""

from ..passes import Pipeline  # from here, so that a text with `lower` in it is understood
from .files.load import load
from .files.save import save
from .folded import Folded, FoldedConv1d, FoldedConv2d, FoldedEmbedding, FoldedLinear
from .lower import Lower
from .quantize import quantize
from .report import Report, report
from .target import Target, default_target, get_target, register_target, target_names

__all__ = [
    "Folded",
    "FoldedConv1d",
    "FoldedConv2d",
    "FoldedEmbedding",
    "FoldedLinear",
    "Lower",
    "Pipeline",
    "Report",
    "Target",
    "default_target",
    "get_target",
    "load",
    "quantize",
    "register_target",
    "report",
    "save",
    "target_names",
]
