"""The walk over sites: what is measured, how often, and what is said of layers that get less than asked."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from chain_model import Block, Model, codes
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.algorithms import float_run
from bitfold.lowering.algorithms import measure as measuring
from bitfold.passes.algorithms.inputs import Inputs


def said(model: nn.Module) -> str:
    return "\n".join(map(str, bf.report(model).misses))


@pytest.fixture
def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 20, 32) for _ in range(3)]


class Breaks(nn.Module):
    """A chain for the first batch; the second runs fewer blocks, the third reaches one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(32) for _ in range(3))
        self.out, self.extra = nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in list(self.blocks)[: 2 if x.shape[0] == 3 else 3]:
            x = block(x)
        return self.extra(x) if x.shape[0] == 2 else self.out(x)


def test_a_chain_that_breaks_later_is_measured_once(
    batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[int, int] = {}
    add = Inputs.add

    def counted(self: Inputs, x: Tensor, exact: Tensor | None = None) -> None:
        add(self, x, exact)
        counts[id(self)] = self.count
        kept.append(self)

    kept: list[Inputs] = []
    monkeypatch.setattr(Inputs, "add", counted)
    model = Breaks().eval()
    data = [batches[0], batches[1][:3], batches[2][:2]]
    bf.quantize(model, "int4[g32]", algorithm="gptq", calibration=data, target="reference")
    assert "each layer is measured in the float model" in said(model)
    rows = [sum(len(x) for x in data) * 20, 7 * 20, 6 * 20, 2 * 20]  # all; `out`; the last block; `extra`
    finished = [one for one in {id(one): one for one in kept}.values() if one.count > 80]
    assert {one.count for one in finished} <= set(rows)


def test_what_solvers_leave_is_in_the_report(batches: list[Tensor]) -> None:
    model = nn.Sequential(nn.Conv1d(4, 32, 3), nn.Flatten(1), nn.Linear(32 * 18, 8)).eval()
    recipe = bf.Recipe("both", (bf.Rule(op="conv", weight="int4[row]"), bf.Rule(weight="int4[row]")))
    bf.quantize(
        model, recipe, algorithm="gptq", calibration=[torch.randn(300, 4, 20)] * 2, target="reference"
    )
    assert "no such statistics" in said(model)


@pytest.mark.parametrize(
    ("text", "algorithm", "sentence"),
    [
        ("uint4[g32,bf16,zero:int]", "gptq,refit", "has zero points"),
        ("int4[4x32]", "gptq,refit", "refit: int4[4x32] has scales that several rows share"),
        ("int4[g32]", "clip,gptq{actorder=false,groups=sequential}", "scales are chosen already"),
        ("nvfp4", "gptq{actorder=false,groups=sequential}", "depend on more than one group"),
        ("int4[4x32]", "gptq{actorder=false,groups=sequential}", "depend on more than one group"),
        ("mxfp4", "learn{steps=1}", "learn: scales of mxfp4 are powers of two"),
        ("uint4[g32,bf16,zero:int]", "gptq,tune{steps=1}", "tune: scales of uint4"),
    ],
)
def test_what_a_format_has_no_place_for_is_in_the_report(
    text: str, algorithm: str, sentence: str, batches: list[Tensor]
) -> None:
    model = bf.quantize(Model().eval(), text, algorithm=algorithm, calibration=batches, target="reference")
    lines = [line for line in said(model).split("\n") if sentence in line]
    assert any(line.startswith("blocks.2.down: ") for line in lines)


@pytest.mark.parametrize(
    "algorithm", ["gptq,refit", "gptq{actorder=false,groups=sequential}", "learn{steps=1}"]
)
def test_what_gets_all_is_not_in_the_report(algorithm: str, batches: list[Tensor]) -> None:
    model = Model().eval()
    recipe = bf.Recipe("blocks", (bf.Rule(match="blocks.*", weight="int4[g32]"),))
    bf.quantize(model, recipe, algorithm=algorithm, calibration=batches, target="reference")
    assert not said(model)


def test_an_embedding_that_clip_cannot_weigh_is_in_the_report(batches: list[Tensor]) -> None:
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 8)).eval()
    recipe = bf.Recipe("both", (bf.Rule(op="embedding|linear", weight="int4[g32]"),))
    words = [torch.randint(64, (4, 20))] * 2
    bf.quantize(model, recipe, algorithm="clip", calibration=words, target="reference")
    assert "0: clip: there are no statistics of what goes into it" in said(model)


def test_ties_are_said_of_without_data_too() -> None:
    model = Model().eval()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    bf.quantize(model, "int4[g32]", algorithm="hqq", target="reference")
    assert "its weight is that of blocks.0.up too" in said(model)


class Run(nn.Module):
    """Blocks one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(32) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Two(nn.Module):
    """Two lists of blocks, and one of layers that all read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = Run(2), Run(3)
        self.heads = nn.ModuleList(nn.Linear(32, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dec(self.enc(x))
        return torch.cat([head(x) for head in self.heads], -1)


@pytest.mark.parametrize("algorithm", ["gptq", "awq,clip", "follow,gptq", "learn{steps=2}"])
def test_each_list_of_blocks_is_walked(algorithm: str, batches: list[Tensor]) -> None:
    """Each has the codes that it gets as a model of its own, on what the float model gives it."""
    asked = {"algorithm": algorithm, "target": "reference"}
    model = Two().eval()
    enc, dec = copy.deepcopy(model.enc), copy.deepcopy(model.dec)
    with torch.no_grad():
        between = [enc(x) for x in batches]
    bf.quantize(model, "int4[g32]", calibration=batches, **asked)
    for part, alone, data in ((model.enc, enc, batches), (model.dec, dec, between)):
        wanted = codes(bf.quantize(alone, "int4[g32]", calibration=data, **asked))
        found = codes(part)
        assert found.keys() == wanted.keys() and len(found) in (6, 9)
        assert all(torch.equal(found[name], wanted[name]) for name in found)
    outside = [miss.module_path for miss in bf.report(model).misses if "outside them" in miss.reason]
    assert outside == ([] if algorithm == "gptq" else ["heads.0", "heads.1"])


class Sometimes(Two):
    """The encoder is no chain for small batches."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.enc.blocks[1](x) if x.shape[0] == 2 else x)


def test_a_lesser_list_that_breaks_later_is_measured_in_float(batches: list[Tensor]) -> None:
    model = Sometimes().eval()
    data = [batches[0], batches[1][:2]]
    bf.quantize(model, "int4[g32]", algorithm="follow,gptq", calibration=data, target="reference")
    found = {miss.module_path for miss in bf.report(model).misses if "outside them" in miss.reason}
    layers = {f"enc.blocks.{i}.{name}" for i in range(2) for name in ("gate", "up", "down")}
    assert found == {*layers, "heads.0", "heads.1"}


def test_clip_without_inputs_needs_no_data() -> None:
    model = Model().eval()
    bf.quantize(model, "int4[g32]", algorithm="clip{weighted=false}", target="reference")
    with pytest.raises(bf.BitfoldError, match="give calibration"):
        bf.quantize(Model().eval(), "int4[g32]", algorithm="clip", target="reference")


@pytest.mark.parametrize("algorithm", ["awq,hqq", "correct_bias", "learn{steps=2}"])
def test_what_looks_at_no_moments_measures_none(
    algorithm: str, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a moment was made")

    if algorithm.startswith("awq"):  # balancing looks at what goes into its groups, by itself
        monkeypatch.setattr(measuring, "_add", never)
    else:
        monkeypatch.setattr(Inputs, "add", never)
    bf.quantize(Model().eval(), "int4[g32]", algorithm=algorithm, calibration=batches, target="reference")


def test_data_for_ranges_is_asked_for_before_an_algorithm_works() -> None:
    steps: list[str] = []
    with pytest.raises(bf.BitfoldError, match="calibrated range"):
        bf.quantize(
            Model().eval(),
            "int8_static",
            algorithm="hqq",
            target="reference",
            progress=lambda what, done, total: steps.append(what),
        )
    assert not [step for step in steps if step.startswith("hqq")]


def test_resume_has_a_sentence_for_each_mistake(tmp_path: Any) -> None:
    x = torch.randn(4, 32)
    with pytest.raises(bf.BitfoldError, match="scope='module' only"):
        bf.quantize(
            Model(), "int4[g32]", algorithm="hqq", scope="program", example_inputs=(x,), resume=tmp_path
        )
    with pytest.raises(bf.BitfoldError, match="give algorithm= too"):
        bf.quantize(Model(), "int4[g32]", resume=tmp_path)


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return x + self.down(h * h)


@pytest.mark.parametrize("algorithm", ["awq,clip", "smooth,clip", "equalize,clip"])
def test_a_square_is_left_alone(algorithm: str, batches: list[Tensor]) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Squares() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    bf.quantize(Chain().eval(), "int4[g32]", algorithm=algorithm, calibration=batches, target="reference")


def test_the_program_scope_tells_of_calibration(batches: list[Tensor]) -> None:
    steps: list[str] = []
    bf.quantize(
        Model().eval(),
        "int8_static",
        scope="program",
        calibration=batches,
        target="reference",
        progress=lambda what, done, total: steps.append(what),
    )
    assert [step for step in steps if step.startswith("calibrate")] == [
        *(f"calibrate on batch {index}" for index in range(len(batches))),
        "calibrated",
    ]


@pytest.mark.parametrize(
    ("algorithm", "sentence"),
    [
        ("descend,gptq", "gptq starts from scales and would throw away the codes of descend"),
        ("gptq,gptq", "gptq is there twice"),
        ("follow,follow,gptq", "follow is there twice"),
        ("learn,learn", "learn is there twice"),
    ],
)
def test_what_would_be_thrown_away_is_said(algorithm: str, sentence: str) -> None:
    with pytest.raises(bf.BitfoldError, match=sentence):
        bf.quantize(Model(), "int4[g32]", algorithm=algorithm, calibration=[torch.randn(4, 32)])


class Overflows(Model):
    """Behind its blocks, where no check of the chain looks."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x) * 1e38 * 1e38)


@pytest.mark.parametrize("algorithm", ["hqq,correct_bias", "learn{steps=2}", "gptq"])
def test_numbers_that_overflow_are_named_without_moments_too(algorithm: str, batches: list[Tensor]) -> None:
    model = Overflows().eval()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(bf.BitfoldError, match="layer last: NaN or infinity goes into it"):
        bf.quantize(model, "int4[row]", algorithm=algorithm, calibration=batches, target="reference")
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("make", [Two, Breaks])
def test_moments_outside_of_blocks_are_held_a_portion_at_a_time(
    make: type[nn.Module], batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same codes, and never more moments than the portion takes."""
    data = [batches[0], batches[1][:3], batches[2][:2]]
    asked = {"algorithm": "clip,gptq", "calibration": data, "target": "reference"}
    torch.manual_seed(0)
    model = make().eval()
    whole = codes(bf.quantize(copy.deepcopy(model), "int4[g32]", **asked))
    add, most, alive = Inputs.add, 0, weakref.WeakSet[Inputs]()

    def noted(self: Inputs, *given: Any) -> None:
        nonlocal most
        alive.add(self)
        most = max(most, sum(len(one.peak) ** 2 for one in alive))
        add(self, *given)

    monkeypatch.setattr(Inputs, "add", noted)
    monkeypatch.setattr(float_run, "_AT_ONCE", 64 * 64)
    found = codes(bf.quantize(model, "int4[g32]", **asked))
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in found)
    assert most <= 2 * 64 * 64  # a portion, and what a group of a block reads


class Frozen(nn.Module):
    """A tower that computes without gradients, before a model that is larger."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList(self.Layer() for _ in range(2))
        self.model = Model()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.tower:
            x = layer(x)
        out: Tensor = self.model(x)
        return out


def test_learning_leaves_a_lesser_list_without_gradients(batches: list[Tensor]) -> None:
    model = Frozen().eval()
    bf.quantize(model, "int4[g32]", algorithm="learn{steps=2}", calibration=batches, target="reference")
    found = [miss.module_path for miss in bf.report(model).misses if "no gradient in it" in miss.reason]
    assert found == ["tower.0", "tower.1"]
