"""What a model returned, as numbers: the tensor that two models are compared by, and how far two are apart.

In: a model and a batch, or what a layer returned. Out: tensors.

    exact, found = first_output(model, batch), first_output(quantized, batch)
    divergence(exact, found)          0.0031 nats: of the predictions of one from the other's
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..formats import BitfoldError
from ..passes.observing.batch import Batch


def first_output(model: nn.Module, batch: Batch) -> Tensor:
    """The first floating-point tensor that the model returns: its `logits`, where it names them."""
    result = batch.run(model)
    named = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    found = numbers(result if named is None else named)
    if not found:
        raise BitfoldError(f"{type(model).__name__} returned no floating-point tensor to compare")
    return found[0]


def float_output(model: nn.Module, batch: Batch) -> Tensor:
    """What the float model gives. Raises BitfoldError for NaN, naming a parameter that has it, if one has."""
    output = first_output(model, batch)
    if bool(output.isnan().any()):
        held = model.named_parameters()
        spoilt = next((name for name, one in held if not bool(one.isfinite().all())), None)
        raise BitfoldError(
            f"the float model's output for {batch.name} has NaN in it; "
            + ("leave it out" if spoilt is None else f"so has {spoilt}, or infinity; mend the weights first")
        )
    return output


def numbers(result: Any) -> list[Tensor]:
    """The floating-point tensors in what was returned, in order."""
    leaves = pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def divergence(exact: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the softmax of the last dimension, the mean over the others, in nats."""
    check_predictions(exact)
    before, after = exact.float().log_softmax(-1), found.float().log_softmax(-1)
    # What both mask by -inf is the same prediction, and not the difference of two infinities.
    masked = (before == -math.inf) & (after == -math.inf)
    before, after = before.masked_fill(masked, 0.0), after.masked_fill(masked, 0.0)
    rows = (-1, exact.shape[-1])
    return F.kl_div(after.reshape(rows), before.reshape(rows), reduction="batchmean", log_target=True)


def check_predictions(output: Tensor) -> None:
    """BitfoldError for an output whose last dimension has one number: every softmax of it is 1, and no
    rounding would seem to cost anything."""
    if output.ndim == 0 or output.shape[-1] == 1:
        raise BitfoldError(
            f"an output of shape {list(output.shape)} holds no predictions whose divergence could be taken; "
            "give another measure (loss= of bf.search, aim=result of tune)"
        )
