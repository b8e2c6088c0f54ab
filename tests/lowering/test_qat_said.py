"""What is said to a user of training on rounded numbers who gives something wrong, and what a step asks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.formats.gradient import Gradient
from bitfold.lowering.qat.trained_as import as_bytes, check_trained_as

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def test_lines_that_a_state_has_more_often_are_told() -> None:
    one, two = "batch norm folded in", "batch norm folded in\nbatch norm folded in"
    with pytest.raises(
        bf.BitfoldError, match=r"'nothing beside what both have', .* as 'batch norm folded in'"
    ):
        check_trained_as(one, as_bytes(two), "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: bf.Qat(rate="x"), "rate is above 0"),  # type: ignore[arg-type]
        (lambda: bf.Qat("lsq+item"), "'item' is set"),
        (lambda: bf.Distill(temperature="a"), "temperature is above 0"),  # type: ignore[arg-type]
        (lambda: bf.Distill(weight=math.nan), "weight of a distillation"),
        (lambda: Gradient("straight", 50), "straight takes no number"),
        (lambda: bf.Distill().of(torch.tensor(1.0), torch.tensor(2.0)), "single number"),
        (lambda: bf.prepare_qat(made(), "int8", dynamic="nonsense"), "dynamic is for scope='program'"),
    ],
)
def test_bad_values_are_one_sentence(given: Any, said: str) -> None:
    with pytest.raises(bf.BitfoldError, match=said):
        given()


def test_one_row_of_logits_is_distilled() -> None:
    said, wanted = torch.zeros(4), torch.tensor([1.0, 0, 0, 0])
    assert torch.equal(bf.Distill().of(said, wanted), bf.Distill().of(said[None], wanted[None]))


def test_a_batch_norm_without_statistics_needs_no_momentum_in_a_program() -> None:
    norm = nn.BatchNorm1d(32, momentum=None, track_running_stats=False)
    model = nn.Sequential(nn.Linear(16, 32), norm, nn.Linear(32, 16))
    bf.prepare_qat(model, "int8", scope="program", example_inputs=(X,))


def test_no_step_after_the_first_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bf.prepare_qat(made(), "int4[g16]", bf.Qat("lsq", warmup=3))
    asked: list[Tensor] = []
    ask = Tensor.tolist
    monkeypatch.setattr(
        Tensor, "tolist", lambda one: (one.dtype == torch.uint8 or asked.append(one), ask(one))[1]
    )
    bf.advance(model)
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for _ in range(4):
        bf.advance(model)
    assert len(asked) == 1
    # A state is another count: scales begin at the end of its warmup.
    model.load_state_dict(state, strict=False)
    bf.advance(model)
    assert len(asked) == 2
    scale = next(p for name, p in model.named_parameters() if name.endswith("weight_step"))
    with torch.no_grad():
        scale.mul_(2)
    before = scale.detach().clone()
    bf.advance(model)
    assert len(asked) == 2
    assert not torch.equal(scale, before)
