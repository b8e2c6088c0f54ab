"""The conversion of a trained model that is stopped midway: no training is lost, and it can be ended."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qat_cases import ALL, TOKENS, Net, loss
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.folded import Folded
from bitfold.lowering.qat.prepared import Prepared

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Pairs(nn.Module):
    """The batch norm comes before its convolution among the model's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 3, bias=False)
        self.last, self.end = nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.last(self.norm(self.conv(x)))).mean((2, 3))


def trained(made: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = bf.prepare_qat(
        made(),
        ALL if made is Net else bf.Recipe("all", (bf.Rule(op="*", weight="int4"),)),
        bf.Qat("lsq"),
        distill=bf.Distill(),
    )
    x = TOKENS if made is Net else X
    optimizer = torch.optim.Adam(bf.parameter_groups(model, 1e-2, 1e-2))
    for _ in range(3):
        (loss(model) if made is Net else model(x).square().sum()).backward()
        optimizer.step()
    return model, x


def stopping(at: int, error: type[BaseException]) -> Callable[[str, int, int], None]:
    """A progress bar that stops everything before the layer `at`."""

    def progress(what: str, done: int, total: int) -> None:
        if done == at:
            raise error("stop")

    return progress


@pytest.mark.parametrize("made", [Net, Pairs])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_what_is_stopped_midway_is_ended_by_another_call(
    made: Callable[[], nn.Module], at: int, tmp_path: Path
) -> None:
    model, x = trained(made)
    undisturbed = bf.convert(copy.deepcopy(model), target="reference").eval().state_dict()
    learned = {name: p for name, p in model.named_parameters() if name.endswith("_step")}
    assert len(learned) >= 2
    with torch.no_grad():
        expected = model.eval()(x)
        with pytest.raises(KeyboardInterrupt):
            bf.convert(model, target="reference", progress=stopping(at, KeyboardInterrupt))
        assert torch.equal(model(x), expected)
    if at < 4:  # no file for what nothing could load
        with pytest.raises(bf.BitfoldError, match=r"holds no codes yet|stopped midway.*call it again"):
            bf.save(model, tmp_path / "half.safetensors")
        assert not list(tmp_path.iterdir())
    left = {name: p for name, p in model.named_parameters() if name.endswith("_step")}
    assert all(learned[name] is p for name, p in left.items()) and len(left) >= len(learned) - at
    assert model._forward_hooks and any(isinstance(one, Prepared) for one in model.modules()) == (at < 4)
    bf.convert(model, target="reference")
    assert not model._forward_hooks and not any(isinstance(one, Prepared) for one in model.modules())
    ours = model.state_dict()
    assert list(ours) == list(undisturbed)
    assert all(torch.equal(ours[name], tensor) for name, tensor in undisturbed.items())
    if made is Net:
        assert model.lm_head.codes is model.embed.codes


def test_memory_that_gives_out_is_one_sentence_and_costs_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trained(Net)
    fold, calls = bf.Format.quantize, []

    def quantize(*given: object, **options: object) -> object:
        calls.append(given)
        if len(calls) > 2:
            raise MemoryError
        return fold(*given, **options)

    monkeypatch.setattr(bf.Format, "quantize", quantize)
    with pytest.raises(bf.BitfoldError, match=r"conv failed \(.*with 2 of 4 .*call bf.convert again"):
        bf.convert(model, target="reference")
    assert isinstance(model.fc, Folded) and isinstance(model.conv, Prepared)


def test_float_weights_are_freed_one_by_one() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    bf.prepare_qat(model, "int4[g16]", bf.Qat("lsq"))
    weights = [weakref.ref(layer.weight) for layer in model]
    steps = [weakref.ref(layer.weight_step) for layer in model]
    alive: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        gc.collect()
        alive.append(sum(one() is not None for one in weights))
        assert alive[-1] == sum(one() is not None for one in steps)

    bf.convert(model, target="reference", progress=progress)
    assert alive == [4, 3, 2, 1, 0]
