"""A model whose layers do not matter alike, for a search to tell them apart."""

import torch
from torch import Tensor, nn


class Unequal(nn.Module):
    """The second layer is a small correction whose rounding hardly matters; the last matters much."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(y + 0.01 * self.second(y)) * 4


def unequal() -> Unequal:
    torch.manual_seed(0)
    return Unequal().eval()
