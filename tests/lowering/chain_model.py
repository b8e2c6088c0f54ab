"""A chain of blocks, as language models are, that tests of algorithms quantize; and the codes it then has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitfold.lowering.folded import Folded


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.norm(x)
        return x + scale * self.down(torch.relu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.out = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.out(x)


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{weight.name}": module.quantized(weight).codes
        for path, module in model.named_modules()
        if isinstance(module, Folded)
        for weight in module.folded_weights
    }
