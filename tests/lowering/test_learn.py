"""Learned rounding: a block's output comes nearer to the float block's, and every weight stays its format's
own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.algorithms import learn_block
from bitfold.passes.algorithms.learn import Learn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def batches(seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    mix = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    return [torch.randn(4, 16, 8) @ mix + torch.randn(4, 16, 32) for _ in range(16)]


def loss(model: Model, algorithm: str | None, text: str = "int3[g32]", seed: int = 2) -> float:
    """On data that calibration has not seen."""
    fresh = batches(seed)
    exact = [model(x).detach() for x in fresh]
    q = copy.deepcopy(model)
    bf.quantize(q, text, algorithm=algorithm, calibration=batches(), target="reference")
    return sum(float((q(x).detach() - y).square().mean()) for x, y in zip(fresh, exact, strict=True))


@pytest.mark.parametrize("text", ["int3[g32]", "mxfp4", "nf4[g32]", "uint3[g32,bf16,zero:int]"])
def test_learning_lowers_what_rounding_loses(model: Model, text: str) -> None:
    assert loss(model, "learn{steps=100}", text) < 0.7 * loss(model, None, text)


def test_learning_goes_on_from_gptq(model: Model) -> None:
    assert loss(model, "clip,gptq,learn{steps=100}") < 0.95 * loss(model, "clip,gptq")


def test_an_interrupted_run_is_taken_up(model: Model, tmp_path: Path) -> None:
    asked = {"algorithm": "gptq,learn{steps=5}", "calibration": batches(), "target": "reference"}
    whole = bf.quantize(copy.deepcopy(model), "int4[g32]", **asked)

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("gptq") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bf.quantize(model, "int4[g32]", resume=tmp_path, progress=stop, **asked)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # a block is kept when it is learned
    q = bf.quantize(model, "int4[g32]", resume=tmp_path, **asked)
    x = batches(3)[0]
    assert torch.equal(q(x), whole(x))


def test_inputs_that_are_rounded_let_gradients_through(model: Model) -> None:
    recipe = bf.Recipe("both", (bf.Rule(weight="int3[g32]", input="int8[row]"),))
    fresh = batches(2)
    exact = [model(x).detach() for x in fresh]

    def lost(algorithm: str | None) -> float:
        q = copy.deepcopy(model)
        bf.quantize(q, recipe, algorithm=algorithm, calibration=batches(), target="reference")
        return sum(float((q(x).detach() - y).square().mean()) for x, y in zip(fresh, exact, strict=True))

    assert lost("learn{steps=100}") < 0.7 * lost(None)


def test_mistakes(model: Model) -> None:
    with pytest.raises(bf.BitfoldError, match="put it after gptq"):
        bf.quantize(model, "int4[g32]", algorithm="learn,gptq", calibration=batches())
    with pytest.raises(bf.BitfoldError, match="this model is none"):
        bf.quantize(nn.Sequential(nn.Linear(32, 8)), "int4[g32]", algorithm="learn", calibration=batches())
    with pytest.raises(bf.BitfoldError, match="1 or more steps"):
        Learn(steps=0)


class Routed(Block):
    """Rows that begin with a positive number go through another layer, if there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        sent = x[..., 0] > 0
        y = x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))
        return y.index_put((sent,), self.other(x[sent])) if bool(sent.any()) else y


def test_a_layer_that_a_batch_does_not_reach_learns_from_the_others() -> None:
    torch.manual_seed(0)
    model = Model()
    model.blocks = nn.ModuleList(Routed() for _ in range(2))
    data = batches()
    with torch.no_grad():
        data += [torch.cat([-x[..., :1].abs(), x[..., 1:]], -1) for x in data[:4]]
        exact = [model(x) for x in data]
        found = []
        for algorithm in (None, "learn{steps=60}"):
            q = copy.deepcopy(model)
            bf.quantize(q, "int3[g32]", algorithm=algorithm, calibration=data, target="reference")
            found.append(sum(float((q(x) - y).square().mean()) for x, y in zip(data, exact, strict=True)))
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_weight_that_an_earlier_block_has_decided_is_not_learned_again(
    resumed: bool, model: Model, tmp_path: Path
) -> None:
    model.blocks[1].up.weight = model.blocks[0].up.weight
    shown: list[list[str]] = []
    given = {"resume": tmp_path} if resumed else {}
    with pytest.MonkeyPatch.context() as patch:
        real = learn_block.roundings

        def seen(sites: Any, root: str) -> Any:
            shown.append([site.path for site in sites])
            return real(sites, root)

        patch.setattr(learn_block, "roundings", seen)
        bf.quantize(model, "int3[g32]", algorithm="gptq,learn{steps=2}", calibration=batches(), **given)
    assert shown == [["blocks.0.up", "blocks.0.down"], ["blocks.1.down"]]
