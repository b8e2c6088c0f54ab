"""The passes that options ask for.

In: a `Qat`, and where numbers come from. Out: the passes that make a graph train so.

    Qat("lsq", warmup=9, start="clip")  ->  train_quantizers{weight=lsq,activation=clip,warmup=9,clip=true}
"""

from __future__ import annotations

from ...passes.training.batch_norm import TrainBatchNorm
from ...passes.training.quantizers import TrainQuantizers
from .options import Qat


def norm_pass(how: Qat, *, loaded: bool = False) -> TrainBatchNorm:
    """The pass that these options ask for. loaded: learned scales come from elsewhere."""
    freeze = -1 if how.freeze_norm is None else how.freeze_norm
    return TrainBatchNorm(freeze=freeze, clip=how.start == "clip" and not loaded, loaded=loaded)


def train_pass(how: Qat, *, ranged: bool = False, loaded: bool = False) -> TrainQuantizers:
    """The pass that these options ask for. ranged: ranges are known elsewhere, so that observers may have
    seen nothing; loaded: all numbers are, and none need be searched for."""
    return TrainQuantizers(
        weight=how.weight,
        activation=how.activation,
        warmup=how.warmup,
        observe=bool(how.observe),
        ranged=ranged or loaded,
        clip=how.start == "clip" and not loaded,
    )
