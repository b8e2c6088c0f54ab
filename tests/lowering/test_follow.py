"""Follow: each layer makes up for what the rounded layers before it have changed."""

from __future__ import annotations

import copy

import pytest
import torch
from chain_model import Model
from torch import Tensor, nn

import bitfold as bf
from bitfold.passes.algorithms.draft import Draft
from bitfold.passes.algorithms.follow import Follow
from bitfold.passes.algorithms.inputs import Inputs
from bitfold.passes.algorithms.solve import Task


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Chain(nn.Module):
    """Linear all through: what one layer's rounding does, the next can undo but for its own rounding."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def batches(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    mix = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    return [torch.randn(4, 40, 8) @ mix + 0.1 * torch.randn(4, 40, 32) for _ in range(8)]


def loss(model: nn.Module, algorithm: str | None) -> float:
    """Squared error of the result, on data that calibration has not seen."""
    q, fresh = copy.deepcopy(model), batches(2)
    bf.quantize(q, "int3[g32]", algorithm=algorithm, calibration=batches(1), target="reference")
    return sum(float((q(x) - model(x)).detach().square().mean()) for x in fresh)


def test_layers_that_follow_lose_less() -> None:
    torch.manual_seed(0)
    model = Chain().eval()
    assert loss(model, "follow,gptq") < 0.5 * loss(model, "gptq")


def test_the_weight_is_the_least_squares_fit() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 8), torch.randn(500, 8)
    exact = x @ torch.randn(8, 8) + 0.1 * torch.randn(500, 8)
    inputs = Inputs(8)
    for part, aim in zip(x.split(100), exact.split(100), strict=True):
        inputs.add(part, aim)
    found = Follow(damping=1e-7).solve(Task("fc", bf.format("int4[g8]"), Draft(weight), inputs)).weight
    fitted = torch.linalg.lstsq(x.double(), (exact @ weight.mT).double()).solution.mT
    assert torch.allclose(found.double(), fitted, atol=1e-4)
    half = Follow(share=0.5, damping=1e-7).solve(Task("fc", bf.format("int4[g8]"), Draft(weight), inputs))
    assert torch.allclose(half.weight, (found + weight) / 2, atol=1e-5)


def test_the_first_layer_has_nothing_to_make_up_for() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(4, 8), Inputs(8)
    x = torch.randn(50, 8)
    inputs.add(x, x)
    draft = Follow().solve(Task("fc", bf.format("int4[g8]"), Draft(weight), inputs))
    assert torch.allclose(draft.weight, weight, atol=1e-6)


def test_where_it_may_stand() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    with pytest.raises(bf.BitfoldError, match="put it before clip"):
        bf.quantize(model, "int4[g32]", algorithm="clip,follow", calibration=batches(1), target="reference")
    with pytest.raises(bf.BitfoldError, match="chain of blocks"):
        plain = nn.Sequential(nn.Linear(32, 32))
        bf.quantize(plain, "int4[g32]", algorithm="follow", calibration=batches(1), target="reference")
    with pytest.raises(bf.BitfoldError, match="scope='module'"):
        bf.quantize(model, "int4[g32]", algorithm="follow", calibration=batches(1), scope="program")
    assert type(model.out) is nn.Linear  # nothing was written
