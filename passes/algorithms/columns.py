"""Where a matrix is rounded column by column: on the device that it is on, or on the CPU if it is small.

In: a weight [N, K] on any device. Out: the device for a loop over its columns.

    column_device(w [512, 1024] on cuda)     ->  cpu
    column_device(w [14336, 4096] on cuda)   ->  cuda

A column takes some twenty operators. On a GPU each is a launch of some microseconds however short the column
is, and processes that share the card wait for each other's; on a CPU they take that long for some thousand
numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows up to which a loop over columns is left to the CPU.
SMALL = 1024


def column_device(weight: Tensor) -> torch.device:
    """Where a loop over the columns of `weight` is to run."""
    return torch.device("cpu") if weight.shape[0] <= SMALL else weight.device
