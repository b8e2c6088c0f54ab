"""From a folded graph to something that runs: targets, the torch.compile backend, quantize, save and load.

    quantize(model, "int4"); save(model, path); load(path, into=skeleton); report(model)
"""

from ..passes import Pipeline
from .folded import Folded, FoldedConv1d, FoldedConv2d, FoldedEmbedding, FoldedLinear
from .load import load
from .quantize import quantize
from .report import Report, report
from .save import save

__all__ = [
    "Folded",
    "FoldedConv1d",
    "FoldedConv2d",
    "FoldedEmbedding",
    "FoldedLinear",
    "Pipeline",
    "Report",
    "load",
    "quantize",
    "report",
    "save",
]
