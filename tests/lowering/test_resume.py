"""What `resume=` goes on from is of this very run: whatever decides the codes, and nothing else, is in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 512)
        self.down = nn.Linear(512, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.register_buffer("shift", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        for block in self.blocks:
            x = block(x)
        return x


class Relu(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.relu(self.up(self.norm(x))))


def _model() -> Model:
    torch.manual_seed(0)
    return Model()


def _batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 70, WIDTH)]


def _run(model: Model, batches: list[Tensor], folder: Path, algorithm: str = "gptq") -> Model:
    return bf.quantize(  # type: ignore[no-any-return]
        model, "int4[g32]", algorithm=algorithm, calibration=batches, resume=folder, target="reference"
    )


def _one_weight(model: Model, batches: list[Tensor]) -> None:
    model.blocks[0].up.weight.data[3, 5] += 9.0


def _one_datum(model: Model, batches: list[Tensor]) -> None:
    batches[0][3, 5, 7] = 900.0


def _a_buffer(model: Model, batches: list[Tensor]) -> None:
    model.shift.add_(1.0)


def _a_number(model: Model, batches: list[Tensor]) -> None:
    model.blocks[0].scale = 3.0


def _another_forward(model: Model, batches: list[Tensor]) -> None:
    model.blocks[0].__class__ = Relu


@pytest.mark.parametrize("change", [_one_weight, _one_datum, _a_buffer, _a_number, _another_forward])
@pytest.mark.parametrize("without", ["", "run.json"])
def test_whatever_decides_the_codes_is_told_apart(
    change: Callable[[Model, list[Tensor]], None], without: str, tmp_path: Path
) -> None:
    _run(_model(), _batches(), tmp_path)
    if without:
        (tmp_path / without).unlink()
    model, batches = _model(), _batches()
    change(model, batches)
    with pytest.raises(bf.BitfoldError, match="another model"):
        _run(model, batches, tmp_path)
    assert not any(parameter.dtype is torch.uint8 for parameter in model.parameters())


def test_the_same_run_is_taken_up(tmp_path: Path) -> None:
    first = _run(_model(), _batches(), tmp_path, "awq,clip,gptq,refit")
    (tmp_path / "blocks.0.up.safetensors").unlink()
    second = _run(_model(), _batches(), tmp_path, "awq,clip,gptq,refit")
    x = _batches()[0]
    assert torch.equal(first(x), second(x))


def test_codes_of_otherwise_balanced_weights_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitfold.passes.algorithms.smooth import Smooth

    factors = Smooth.factors
    _run(_model(), _batches(), tmp_path, "smooth,gptq")
    monkeypatch.setattr(Smooth, "factors", lambda self, weights: factors(self, weights) * 2.0)
    exact, model, x = _model(), _model(), _batches()[0]
    _run(model, _batches(), tmp_path, "smooth,gptq")
    with torch.no_grad():
        lost = (model(x) - exact(x)).norm() / exact(x).norm()
    assert float(lost) < 0.1  # half of the norm under codes for the whole of it loses 0.3


@pytest.mark.parametrize("text", ["[1]", "{}", "{", ""])
def test_a_damaged_run_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(bf.BitfoldError, match=r"run\.json|cannot hold"):
        _run(_model(), _batches(), tmp_path)


def test_another_layers_file_is_said(tmp_path: Path) -> None:
    _run(_model(), _batches(), tmp_path)
    shutil.copy(tmp_path / "blocks.0.up.safetensors", tmp_path / "blocks.0.down.safetensors")
    with pytest.raises(bf.BitfoldError, match=r"down\.safetensors is damaged"):
        _run(_model(), _batches(), tmp_path)


def test_codes_that_are_not_those_that_were_written_are_said(tmp_path: Path) -> None:
    _run(_model(), _batches(), tmp_path)
    path = tmp_path / "blocks.0.up.safetensors"
    path.write_bytes(path.read_bytes()[:-40] + bytes([255] * 40))
    with pytest.raises(bf.BitfoldError, match=r"up\.safetensors is damaged \(its codes are not those"):
        _run(_model(), _batches(), tmp_path)


def test_a_module_with_a_slash_in_its_name(tmp_path: Path) -> None:
    model = _model()
    model.blocks[0].add_module("a/b", nn.Linear(WIDTH, WIDTH))
    model.blocks[0].norm.register_forward_hook(lambda m, a, y: model.blocks[0]._modules["a/b"](y))
    _run(model, _batches(), tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["fingerprint"]
    assert (tmp_path / "blocks.0.a%2Fb.safetensors").is_file()
