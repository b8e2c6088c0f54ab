"""Sensitivity without a run for each layer and format: the trace of the Hessian, and how far rounding moves.

In: a model, data, candidate formats. Out: a `Sensitivity`, as the measured one.

    loss of a layer in a format  =  trace(H) / (2 n) * |W' - W|^2,    n numbers in W

H is the second derivative of the divergence from the model's own predictions by W. At W that divergence has
no slope, and its H is Fisher's matrix, whose trace is the mean of |d log p(y | x) / dW|^2 over y drawn from
the predictions themselves. Draws of different rows are independent and their gradients have mean zero, so
one backward pass through the sum of all rows gives an unbiased estimate for every layer at once. The mean
trace as the weight of |W' - W|^2 is HAWQ-V2's (Dong et al., arXiv 1911.03852), who estimate it by products
with random vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import BitfoldError, format
from ...passes.algorithms.draft import draft_of
from ...passes.core import Progress
from ...passes.note import annotated
from ..algorithms.at_rest import hooked
from ..algorithms.calibration import Batches
from ..given_model import module_of
from ..module_scope import Site
from ..outputs import check_predictions, float_output
from .layers import Reached, none_fits, one_weight, planned, tied
from .sensitivity import Choice, Sensitivity


def trace_sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    formats: Sequence[str],
    *,
    draws: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """Estimates for every linear in every format that fits it: `draws` backward passes a batch in all. The
    model is as it was afterwards. Raises BitfoldError for no data."""
    model = module_of(model, "bf.search")
    batches = list(Batches(data, None))
    if not batches or draws < 1:
        raise BitfoldError("a trace is estimated on one batch and one draw at least")
    texts = list(dict.fromkeys(str(format(one)) for one in formats))
    plans = {text: planned(model, text).sites for text in texts}
    reached = Reached(site for sites in plans.values() for site in sites)
    modules = {site.path: site.module for sites in plans.values() for site in sites}
    weights = {path: _weight(module) for path, module in modules.items()}
    traces = dict.fromkeys(weights, 0.0)
    generator = torch.Generator().manual_seed(seed)
    with hooked(model, reached.hooks), _trainable(weights.values()):
        for done, batch in enumerate(batches):
            for _ in range(draws):
                if progress is not None:
                    progress("estimate traces", done, len(batches))
                for path, value in _squares(model, batch, weights, generator).items():
                    traces[path] += value / (len(batches) * draws)
    choices, numel = [], {}
    groups = [(text, group) for text, sites in plans.items() for group in one_weight(reached.of(sites))]
    for text, (site, *_) in groups:
        bits, moved, count = _moved(site, text)
        numel[site.path] = count
        choices.append(Choice(site.path, text, bits, traces[site.path] / (2 * count) * moved))
    if not numel:
        raise BitfoldError(none_fits(model, formats))
    return Sensitivity(tuple(choices), numel, reached.warn_of_others(), tied(group for _, group in groups))


def _squares(
    model: nn.Module, batch: Any, weights: dict[str, nn.Parameter], generator: torch.Generator
) -> dict[str, float]:
    """One draw: trace(H) of the mean over rows, for each layer."""
    with torch.enable_grad():
        result = float_output(model, batch)
        check_predictions(result)
        rows = result.float().reshape(-1, result.shape[-1]).log_softmax(-1)
        chance = rows.detach().exp().cpu()
        drawn = torch.multinomial(chance, 1, generator=generator).to(rows.device)
        total = rows.gather(-1, drawn).sum()
        if not total.requires_grad:
            raise BitfoldError(
                f"{type(model).__name__} computes under torch.no_grad(), so there are no traces of second "
                "derivatives; search with by='measured'"
            )
        gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    squares = (0.0 if g is None else float(g.float().square().sum()) for g in gradients)
    return {path: value / len(rows) for path, value in zip(weights, squares, strict=True)}


def _moved(site: Site, text: str) -> tuple[float, float, int]:
    """Bits that the site's codes take, the square of what rounding moves, and the count of numbers."""
    fmt, bits, moved, count = format(text), 0.0, 0.0, 0
    for node, note in annotated(site.gm):
        draft = draft_of(site.gm, node, note)
        if draft is None or not note.weight:
            continue
        bits += fmt.bits_per_element(draft.weight.shape) * draft.weight.numel()
        moved += float((draft.rounded(fmt) - draft.weight).double().square().sum())
        count += draft.weight.numel()
    return bits, moved, count


def _weight(module: nn.Module) -> nn.Parameter:
    held = module._parameters.get("weight")
    if held is None:
        raise BitfoldError(
            f"a {type(module).__name__} has no weight of its own, whose trace could be estimated"
        )
    return held


@contextmanager
def _trainable(weights: Iterable[Tensor]) -> Iterator[None]:
    """Gradients reach these for as long as a block of code runs."""
    before = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in before:
            weight.requires_grad_()
        yield
    finally:
        for weight, asked in before:
            weight.requires_grad_(asked)
