"""What is said to a user of training on rounded numbers who gives something wrong."""

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch
from qat_cases import ALL, Net, loss
from torch import nn

import bitfold as bf
from bitfold.formats.gradient import Gradient
from bitfold.lowering.qat.prepared import Prepared
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
        (lambda: bf.Qat(activation="lsq+item"), "'item' is set"),
        (lambda: bf.Qat(3), "a gradient is text such as"),  # type: ignore[arg-type]
        (lambda: bf.Qat("lsq+itme"), r"may be \+stochastic, \+keep, \+kernel, \+fused"),
        (lambda: bf.Qat("clip+kernel+stochastic"), "no kernel rounds at random"),
        (lambda: bf.Qat(fold_norm="no"), "fold_norm is True or False"),  # type: ignore[arg-type]
        (lambda: Gradient(["lsq"]), "called by a name"),  # type: ignore[arg-type]
        (lambda: Gradient("lsq", keep=1), "keep is True or False"),  # type: ignore[arg-type]
        (lambda: Gradient("smooth", True), "takes a number such as 5"),
        (lambda: Gradient("smooth", 101), "at most 100"),
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


@pytest.mark.parametrize("scope", ["module", "program"])
@pytest.mark.parametrize(
    ("recipe", "how", "said"),
    [
        (
            "nvfp4",
            bf.Qat("clip+kernel"),
            "weight of layer .* 'clip\\+kernel': no kernel rounds f32 numbers to nvfp4",
        ),
        ("nvfp4", bf.Qat("straight+kernel"), "no kernel rounds f32 numbers to nvfp4"),
        ("int4[g16]", bf.Qat("smooth+kernel"), "smooth:5 has no lines of Triton; leave \\+kernel out"),
        ("int8_static", bf.Qat(activation="clip+kernel"), "input of layer .* row of memory"),
        ("float64", bf.Qat("lsq+kernel"), "numbers are bf16, f16, f32"),
    ],
)
def test_a_kernel_that_there_is_not_is_refused(scope: Any, recipe: str, how: bf.Qat, said: str) -> None:
    model, given = made(), {"calibration": [X], "example_inputs": (X,), "scope": scope}
    if recipe == "float64":
        model, recipe, given = (
            made().double(),
            "int4[g16]",
            given | {"example_inputs": (X.double(),), "calibration": [X.double()]},
        )
    before = model(given["example_inputs"][0])
    with pytest.raises(bf.BitfoldError, match=said):
        bf.prepare_qat(model, recipe, how, **given)
    assert type(model[0]) is nn.Linear and torch.equal(model(given["example_inputs"][0]), before)


@pytest.mark.parametrize("scope", ["module", "program"])
def test_a_kernel_that_there_is_not_here_is_in_the_report(scope: Any) -> None:
    asked = bf.prepare_qat(made(), "int4[g16]", bf.Qat("lsq+kernel"), scope=scope, example_inputs=(X,))
    misses = [str(miss) for miss in bf.report(asked).misses if "kernel" in miss.asked]
    assert len(misses) == 2 and "weight lsq+kernel: cpu has no kernel" in misses[0]
    plain = bf.prepare_qat(made(), "int4[g16]", bf.Qat("lsq"), scope=scope, example_inputs=(X,))
    assert not [miss for miss in bf.report(plain).misses if "kernel" in miss.asked]


def test_on_a_card_what_has_no_kernel_is_no_reference() -> None:
    """Before anything is launched, so that no card is needed."""
    from bitfold.lowering.cuda.rounding import gradients, has_kernel, rounded

    assert has_kernel(X, "int4[g16]") and not has_kernel(X, "nvfp4") and not has_kernel(X[0, 0], "int4[g16]")
    with pytest.raises(bf.BitfoldError, match="no kernel rounds f32 numbers to nvfp4"):
        rounded(X, [], "nvfp4")
    with pytest.raises(bf.BitfoldError, match="no lines of Triton"):
        gradients(X, X, [], [], "int4[g16]", "smooth:5+kernel")
    with pytest.raises(bf.BitfoldError, match=r"the dtype of x, torch.float32, not torch.bfloat16"):
        gradients(X.bfloat16(), X, [], [], "int4[g16]", "clip+kernel")


def test_gradients_of_options_are_gradients() -> None:
    how = bf.Qat("lsq+keep", Gradient("clip"))
    assert how.weight == Gradient("lsq", keep=True) and bf.Qat.activation == Gradient("clip")
    for same in (dataclasses.replace(how), copy.deepcopy(how), pickle.loads(pickle.dumps(how))):
        assert same == how and hash(same) == hash(how) and isinstance(same.weight, Gradient)
    with pytest.raises(dataclasses.FrozenInstanceError):
        how.weight = "clip"  # type: ignore[misc]


def test_mistakes_are_one_sentence_and_change_nothing() -> None:
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = [
        (lambda: bf.prepare_qat(model, "int8_static"), "calibrat"),
        (
            lambda: bf.prepare_qat(model, "int8_static", bf.Qat(activation="lsq", observe=3)),
            "begins at a calibrated one",
        ),
        (lambda: bf.prepare_qat(model, "int8", bf.Qat("lsqq")), "lsq"),
        (lambda: bf.prepare_qat(model, "int8", "lsq"), "bf.Qat"),
        (lambda: bf.prepare_qat(model, "uint4[g16,zero]", bf.Qat("pact")), "zero point"),
        (lambda: bf.prepare_qat(model, "float8_e4m3fn[unscaled]", bf.Qat("lsq")), "no scale"),
        (lambda: bf.prepare_qat(model, "int4[g24]"), "24"),
        (lambda: bf.prepare_qat(model, "int8", state="run.pt"), "state dict, as torch.load.* not a str"),
        (lambda: bf.convert(model), "nothing"),
        (lambda: bf.advance(model), "nothing"),
    ]
    for call, says in wrong:
        with pytest.raises(bf.BitfoldError, match=says):
            call()
        assert type(model.fc) is nn.Linear
        assert set(before) == set(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    bf.prepare_qat(model, ALL, bf.Qat("lsq"))
    with pytest.raises(bf.BitfoldError, match="24"):
        bf.prepare_qat(model, "int4[g24]")
    with pytest.raises(bf.BitfoldError, match=r"prepared for training; call bf.convert"):
        bf.quantize(model, "int8")
    assert isinstance(model.fc, Prepared) and isinstance(model.embed, Prepared)
    with torch.no_grad():
        model.fc.weight_step[0] = math.nan
    with pytest.raises(bf.BitfoldError, match="not finite"):
        bf.convert(model)
    assert isinstance(model.fc, Prepared) and isinstance(model.conv, Prepared)
    loss(model).backward()
    with torch.no_grad():
        model.fc.weight_step[0] = 1.0
    bf.convert(model)
    with pytest.raises(bf.BitfoldError, match="codes do not train"):
        bf.prepare_qat(model, ALL)


def test_a_range_without_data_is_not_converted() -> None:
    model = bf.prepare_qat(Net(), "int8_static", bf.Qat(observe=3))
    with pytest.raises(bf.BitfoldError, match="no data"):
        bf.convert(model)
    assert isinstance(model.fc, Prepared)


def test_what_counts_the_warmup_leaves_with_it() -> None:
    model = bf.prepare_qat(made(), "int4[g16]", bf.Qat("lsq", warmup=2))
    bf.advance(model)
    assert not [name for name in bf.convert(model)[0].__dict__ if "counted" in name]


def test_a_teacher_in_another_dtype_is_told_so() -> None:
    model = bf.prepare_qat(made(), "int4[g16]", distill=bf.Distill()).to(torch.bfloat16)
    with pytest.raises(bf.BitfoldError, match=r"in another dtype, .* call .to\(dtype\) where that run did"):
        bf.prepare_qat(made().to(torch.bfloat16), "int4[g16]", distill=bf.Distill(), state=model.state_dict())
