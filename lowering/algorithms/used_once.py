"""Which parameters have more than one use: changing them for one reader would change them for another.

In: a model and a batch that it takes. Out: the parameters, by identity, that may not be scaled for a block.

    blocks[0].norm is blocks[1].norm;  head(blocks[1].norm(x));  lm_head.weight is embed.weight
    ->  {id(norm.weight), id(embed.weight)}
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ...passes.observing.batch import Batch
from ..parameters import parameter_names
from .at_rest import hooked


def used_more_than_once(model: nn.Module, batch: Batch) -> frozenset[int]:
    """Parameters of several names, and those of a module that the batch's forward calls several times."""
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[module] += 1

    owners = [module for module in model.modules() if module._parameters]
    with hooked(model, dict.fromkeys(owners, count)):
        batch.run(model)
    again = {
        id(parameter)
        for module, times in calls.items()
        if times > 1
        for parameter in module._parameters.values()
    }
    return frozenset(again | {key for key, paths in parameter_names(model).items() if len(paths) > 1})
