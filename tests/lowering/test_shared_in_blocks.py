"""Blocks that share parameters, use a layer twice or write into their input compute what they computed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf
from bitfold.lowering.algorithms.at_rest import at_rest
from bitfold.lowering.algorithms.blocks import Chain
from bitfold.lowering.algorithms.record_blocks import block_lists, record
from bitfold.passes import Pipeline
from bitfold.passes.algorithms.balance import Balancer, Weights
from bitfold.passes.observing.batch import as_batch

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)  # type: ignore[no-any-return]


class ReadsANorm(Model):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(self.blocks[1].norm(x))  # type: ignore[no-any-return]


def _shared_norm() -> Model:
    model = Model()
    model.blocks[1].norm = model.blocks[0].norm
    return model


def _shared_linear() -> Model:
    model = Model()
    model.blocks[1].up = model.blocks[0].up
    return model


def _tied() -> Model:
    model = Model()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return model


def _batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 24, WIDTH) * torch.logspace(-1, 1, WIDTH) for _ in range(count)]


@pytest.mark.parametrize("make", [ReadsANorm, _shared_norm, _shared_linear, _tied])
@pytest.mark.parametrize("algorithm", ["smooth", "awq,clip,gptq"])
def test_what_something_else_reads_is_not_scaled(make: type[Model], algorithm: str) -> None:
    torch.manual_seed(0)
    model = make()
    exact, x = copy.deepcopy(model), _batches(1)[0]
    bf.quantize(model, "int8[g32]", algorithm=algorithm, calibration=_batches())
    with torch.no_grad():
        reference, found = exact(x), model(x)
    # int8 loses a few tenths of a percent here; a norm divided for one of its readers alone loses a third.
    assert float((found - reference).norm() / reference.norm()) < 0.02
    assert any("more than one place" in miss.reason for miss in bf.report(model).misses)


@dataclass(frozen=True)
class Wild(Balancer):
    """Factors that leave float16's range: zeros in the norm, infinities in the weights."""

    name: ClassVar[str] = "wild"

    def factors(self, weights: Weights) -> Tensor | None:
        return torch.full((weights.group.width,), 1e12)


def test_a_weight_past_its_dtypes_range_is_not_taken_for_the_same() -> None:
    torch.manual_seed(0)
    model = Model().half()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(bf.BitfoldError, match="computes something else"):
        bf.quantize(
            model, "int8[g32]", algorithm=Pipeline([Wild()]), calibration=[x.half() for x in _batches()]
        )
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


class Adds(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.down(F.gelu(self.up(self.norm(x))))
        return x


def test_a_block_that_writes_into_its_input_starts_from_the_same_again() -> None:
    torch.manual_seed(0)
    model = Model(Adds).eval()
    (chain,) = record(model, [as_batch(_batches(1)[0], "batch")], block_lists(model))
    assert isinstance(chain, Chain)
    with at_rest(model):
        first = chain.run(0, 0).clone()
        assert torch.equal(chain.run(0, 0), first)


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x)))) + self.down(100 * F.gelu(self.up(-x)))


def test_every_call_of_a_layer_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitfold.passes.algorithms.inputs import Inputs

    counts: dict[Inputs, int] = {}  # held, so that none comes in another's place
    add = Inputs.add

    def counted(self: Inputs, x: Tensor, exact: Tensor | None = None) -> None:
        add(self, x, exact)
        counts[self] = self.count

    monkeypatch.setattr(Inputs, "add", counted)
    torch.manual_seed(0)
    batches = _batches(2)
    bf.quantize(Model(Twice), "int4[g32]", algorithm="gptq", calibration=batches)
    tokens = sum(batch.shape[0] * batch.shape[1] for batch in batches)
    # up and down of each block run twice a batch, the last layer once.
    assert sorted(counts.values()) == [tokens, *[2 * tokens] * 4]


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (torch.randn(1, 4, WIDTH, device="meta"), "batch 0 has no numbers"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "batch 0 is empty"),
    ],
)
def test_batches_without_numbers_are_said(batch: object, match: str) -> None:
    with pytest.raises(bf.BitfoldError, match=match):
        bf.quantize(Model(), "int4[g32]", algorithm="gptq", calibration=[batch])


def test_a_damping_that_is_no_number_is_said() -> None:
    with pytest.raises(bf.BitfoldError, match="damping above 0"):
        bf.quantize(Model(), "int4[g32]", algorithm="gptq{damping=nan}", calibration=_batches())
