"""What blocks are given when they are run by themselves is what the model gives them: twins that compute the
same are measured alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chain_model import codes
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def inner(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Beside(Block):
    """The residual is an argument and a result of its own."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        residual = residual + x
        return self.inner(residual), residual


class Chain(nn.Module):
    def __init__(self, kind: type[Block] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rest = torch.zeros_like(x)
        for block in self.blocks:
            if isinstance(block, Beside):
                x, rest = block(x, rest)
            else:
                x = block(x)
        return x + rest


def chain(kind: type[Block] = Block) -> Chain:
    torch.manual_seed(0)
    return Chain(kind).eval()


def asked(algorithm: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 40, 32, generator=draw) for _ in range(3)]
    return {"algorithm": algorithm, "calibration": batches, "target": "reference"}


def solved(model: nn.Module, algorithm: str) -> list[Tensor]:
    return list(codes(bf.quantize(model, "int3[g32]", **asked(algorithm))).values())


@pytest.mark.parametrize("algorithm", ["gptq", "follow,gptq", "awq"])
def test_a_residual_that_travels_beside_is_that_of_the_rounded_blocks(algorithm: str) -> None:
    found = [solved(chain(kind), algorithm) for kind in (Block, Beside)]
    same = [float((a == b).float().mean()) for a, b in zip(*found, strict=True)]
    assert min(same) > 0.98  # the sums are in another order at the end


def test_a_users_hook_before_a_block_runs_once() -> None:
    def twice(module: nn.Module, args: Any) -> Any:
        return (2 * args[0],)

    class Doubled(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    hooked, plain = chain(), chain()
    plain.__class__ = Doubled
    hooked.blocks[0].register_forward_pre_hook(twice)
    pairs = zip(solved(hooked, "gptq"), solved(plain, "gptq"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Stateful(Block):
    """Every call counts, and shows in what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.inner(x) * self.calls


@pytest.mark.parametrize("algorithm", ["gptq,correct_bias", "gptq,learn{steps=5}", "awq"])
def test_every_run_of_a_block_starts_from_the_same_buffers(algorithm: str) -> None:
    counting, plain = chain(Stateful), chain()
    found = solved(counting, algorithm)
    assert all(torch.equal(a, b) for a, b in zip(found, solved(plain, algorithm), strict=True))
    assert all(block.calls == 0 for block in counting.blocks)
