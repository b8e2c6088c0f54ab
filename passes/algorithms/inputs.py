"""What an algorithm knows of the activations that a layer multiplies: their second moment, not themselves.

In: batches of activations [..., K]. Out: per layer, whatever the number of tokens, K x K numbers and a few K.

    seen = Inputs(256); seen.add(x); seen.moment       mean of x^T x, [256, 256]
                        seen.peak, seen.magnitude      each channel's largest and mean magnitude, [256]
    seen.add(x, exact=y); seen.cross                   mean of y^T x, y what the float model has there

The output error of a changed weight follows from the moment alone: the mean over tokens of |(W' - W) x|^2 is
the trace of (W' - W) H (W' - W)^T (LeCun, Denker and Solla, "Optimal Brain Damage", 1989; here with H the
moment of a linear's input, as in arXiv 2208.11580).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import BitfoldError
from .moments import row_error

INPUTS = "bitfold_inputs"
"""In `node.meta` of an anchor: the `Inputs` that were seen there."""


class Inputs:
    """Running statistics of one layer's input, on the device and over the tokens that went through."""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.moment = torch.zeros(k, k, device=device)
        self.peak = torch.zeros(k, device=device)
        self.magnitude = torch.zeros(k, device=device)
        self.cross: Tensor | None = None

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Take x [..., K] into account, and what the float model has in its place, if that is known (for all
        of x or for none). Raises BitfoldError for NaN or infinity, which would spoil all."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(self.moment.device, torch.float32)
        if not rows.numel():
            return
        if not bool(torch.isfinite(rows).all()):
            raise BitfoldError("NaN or infinity goes into it")
        # A model may run under autocast, which would multiply these in bfloat16.
        with torch.autocast(rows.device.type, enabled=False):
            self._add(rows, exact)

    def _add(self, rows: Tensor, exact: Tensor | None) -> None:
        self.count += rows.shape[0]
        share = rows.shape[0] / self.count
        self.moment.lerp_(rows.mT @ rows / rows.shape[0], share)
        self.magnitude.lerp_(rows.abs().mean(0), share)
        self.peak = torch.maximum(self.peak, rows.abs().amax(0))
        if exact is not None:
            aim = exact.detach().reshape(rows.shape).to(rows.device, torch.float32)
            if self.cross is None:
                self.cross = torch.zeros_like(self.moment)
            self.cross.lerp_(aim.mT @ rows / rows.shape[0], share)

    def error(self, difference: Tensor) -> Tensor:
        """Mean squared output error of each row of `difference` [N, K], [N]."""
        return row_error(difference, self.moment)
