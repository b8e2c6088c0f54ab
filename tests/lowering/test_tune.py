"""Tune: a whole model learns from what its float self predicts, and what it may not be combined with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.outputs import divergence


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tokens to logits; embedding and head are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.RMSNorm(32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def batches(seed: int = 1, count: int = 16) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randint(50, (4, 16)) for _ in range(count)]


def lost(model: Model, algorithm: str | None, text: str = "int2[g32]") -> float:
    """Divergence on data that nothing has seen."""
    q = bf.quantize(
        copy.deepcopy(model), text, algorithm=algorithm, calibration=batches(), target="reference"
    )
    with torch.no_grad():
        return sum(float(divergence(model(ids), q(ids))) for ids in batches(2))


@pytest.mark.parametrize("text", ["int2[g32]", "int3[g32]", "mxfp4", "nvfp4", "int3[g32,zero:int]"])
def test_it_comes_nearer_than_what_came_before(model: Model, text: str) -> None:
    before = lost(model, "clip,gptq", text)
    assert lost(model, "clip,gptq,tune{steps=100}", text) < 0.8 * before


def test_each_kind_of_leaf_moves_alone(model: Model) -> None:
    before = lost(model, "clip,gptq")
    for kind in (
        "rate=0.02,scales=0.0,vectors=0.0",
        "rate=0.0,scales=0.001,vectors=0.0",
        "rate=0.0,scales=0.0,vectors=0.01",
    ):
        assert lost(model, f"clip,gptq,tune{{steps=60,{kind}}}") < 0.97 * before


def test_what_is_not_learned_is_as_it_was(model: Model) -> None:
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    q = bf.quantize(
        copy.deepcopy(model), "int3[g32]", algorithm="gptq,tune{steps=20,vectors=0.0}", calibration=batches()
    )
    assert torch.equal(q.norm.weight, model.norm.weight)
    assert q.head.weight is q.embed.weight  # neither takes codes: still one parameter
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_nothing_is_kept_that_is_worse(model: Model) -> None:
    """Steps far too large are thrown away, batches kept aside having said so."""
    wild = "gptq,tune{steps=10,rate=0.9,scales=0.5,vectors=0.5}"
    assert lost(model, wild) == pytest.approx(lost(model, "gptq"))


def test_behind_rotations_and_balance(model: Model) -> None:
    for first in ("rotate,clip,gptq", "awq,clip,gptq", "follow,clip,gptq,learn{steps=20}"):
        assert lost(model, f"{first},tune{{steps=60}}") < lost(model, first)


def test_activations_are_rounded_while_it_learns(model: Model) -> None:
    recipe = bf.Recipe("both", (bf.Rule(weight="int3[g32]", input="int4"),))
    found = []
    for algorithm in ("gptq", "gptq,tune{steps=60,rate=0.02,scales=0.005}"):
        q = bf.quantize(copy.deepcopy(model), recipe, algorithm=algorithm, calibration=batches())
        with torch.no_grad():
            found.append(sum(float(divergence(model(ids), q(ids))) for ids in batches(2)))
    assert found[1] < found[0]


def test_the_result_itself_as_an_aim(model: Model) -> None:
    trunk = nn.Sequential(*copy.deepcopy(model).blocks)
    torch.manual_seed(3)
    data = [torch.randn(4, 8, 32) for _ in range(8)]
    found = []
    for algorithm in ("gptq", "gptq,tune{steps=60,rate=0.02,scales=0.005,aim=result}"):
        q = bf.quantize(copy.deepcopy(trunk), "int2[g32]", algorithm=algorithm, calibration=data)
        with torch.no_grad():
            found.append(sum(float((trunk(x) - q(x)).square().mean()) for x in data))
    assert found[1] < 0.9 * found[0]


def test_resumed_it_is_the_same(model: Model, tmp_path: Path) -> None:
    asked = {"algorithm": "clip,gptq,tune{steps=20}", "calibration": batches(), "resume": tmp_path}
    first = bf.quantize(copy.deepcopy(model), "int3[g32]", **asked)  # type: ignore[arg-type]
    again = bf.quantize(copy.deepcopy(model), "int3[g32]", **asked)  # type: ignore[arg-type]
    for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_it_is_last_and_alone(model: Model, tmp_path: Path) -> None:
    for text, said in (
        ("tune,gptq", "put it after gptq"),
        ("gptq,tune,correct_bias", "both have the last word"),
        ("gptq,tune,tune", "both have the last word"),
    ):
        with pytest.raises(bf.BitfoldError, match=said):
            bf.quantize(model, "int3[g32]", algorithm=text, calibration=batches())
    with pytest.raises(bf.BitfoldError, match="rates from 0 to 1"):
        bf.quantize(model, "int3[g32]", algorithm="gptq,tune{rate=1.5}", calibration=batches())
    with pytest.raises(bf.BitfoldError, match="resume does not keep"):
        bf.quantize(model, "int3[g32]", algorithm="follow,gptq,tune", calibration=batches(), resume=tmp_path)


def test_a_block_that_stands_in_two_places_is_tuned_once(model: Model) -> None:
    model.blocks[1] = model.blocks[0]
    assert lost(model, "gptq,tune{steps=50,rate=0.02}") < lost(model, "gptq")


def test_tune_alone_starts_from_plain_rounding(model: Model) -> None:
    assert lost(model, "tune{steps=40}") < lost(model, None)
