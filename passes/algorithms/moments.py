"""What solvers do with the second moment of a layer's inputs: damp it, factor it, take an error by it.

In: the moment H [K, K] of `inputs.py`, float32. Out: matrices of its size, or errors of rows.

    damped(h, 0.01)              h with a hundredth of its mean diagonal added to the diagonal
    factored(h, 0.01)            L, float64, with L L^T the damped moment
    inverse_factor(h, 0.01)      U with U^T U its inverse: what gptq goes by
    row_error(d, h)              d H d^T for each row of d: the mean squared output error

Directions in which nothing came in have no curvature, so every solver adds damping; where that does not
suffice, ten times as much.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...formats import BitfoldError

_TRIES = 6


def damped(moment: Tensor, damping: float) -> Tensor:
    """The moment with a share of its mean diagonal added: what gptq minimizes too."""
    mean = moment.diagonal().mean()
    return moment + damping * mean * torch.eye(moment.shape[0], device=moment.device, dtype=moment.dtype)


def row_error(difference: Tensor, moment: Tensor) -> Tensor:
    """For each row of `difference` [N, K] its mean squared output error, [N]."""
    return (difference @ moment * difference).sum(-1)


def factored(moment: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of the damped moment, float64 [K, K]. Raises BitfoldError if it has none."""
    diagonal = moment.diagonal().to(torch.float64)
    for work in _damped_more(moment, diagonal, damping, diagonal.mean()):
        lower, failed = torch.linalg.cholesky_ex(work)
        if not bool(failed):
            found: Tensor = lower
            return found
    raise BitfoldError(_NOT_POSITIVE)


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moment, float32 [K, K]. Raises BitfoldError if
    it has none.

    In float64: the inverse of a nearly singular float32 matrix is noise. Channels that were never active get
    the diagonal's mean, and so cost nothing and take nothing.
    """
    diagonal = moment.diagonal().to(torch.float64)
    mean = diagonal.mean()
    if not bool(mean > 0):
        return torch.eye(moment.shape[0], device=moment.device)
    diagonal = torch.where(diagonal == 0, mean, diagonal)
    # Each matrix ends before the next but one begins: at 14336 channels one is 1.6 GB.
    for work in _damped_more(moment, diagonal, damping, mean):
        work, failed = torch.linalg.cholesky_ex(work)
        if not bool(failed):
            work = torch.cholesky_inverse(work)
            work, failed = torch.linalg.cholesky_ex(work, upper=True)
            if not bool(failed):
                factor: Tensor = work.to(torch.float32)
                return factor
    raise BitfoldError(_NOT_POSITIVE)


_NOT_POSITIVE = "the second moment of the inputs is not a positive matrix; look at the calibration data"


def _damped_more(moment: Tensor, diagonal: Tensor, damping: float, mean: Tensor) -> Iterator[Tensor]:
    """The moment in float64 with that share of `mean` more on its diagonal, then ten times as much, and so
    on."""
    for _ in range(_TRIES):
        yield _with_diagonal(moment, diagonal + damping * mean)
        damping *= 10


def _with_diagonal(moment: Tensor, diagonal: Tensor) -> Tensor:
    work = moment.to(torch.float64, copy=True)
    work.diagonal().copy_(diagonal)
    return work
