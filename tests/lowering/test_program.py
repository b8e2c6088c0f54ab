"""A program in its user's hands: it leaves the model alone, and says what it cannot do."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 8))


def program(given: nn.Module, target: str = "reference") -> torch.fx.GraphModule:
    made = bf.quantize(
        given, "int4[g32]", scope="program", example_inputs=(X,), dynamic="batch", target=target
    )
    assert isinstance(made, torch.fx.GraphModule)
    return made


def snapshot(given: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in given.state_dict().items()}


def unchanged(given: nn.Module, before: dict[str, Tensor]) -> bool:
    now = given.state_dict()
    return all(now[name].dtype == old.dtype and torch.equal(now[name], old) for name, old in before.items())


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_running_statistics_of_a_program_are_its_own(target: str) -> None:
    mine = model().train()
    before = snapshot(mine)
    made = program(mine, target)
    made(X)
    assert unchanged(mine, before)
    # It is in train mode as the model was when it was captured: it counts its own batches.
    assert int(made.get_buffer("1.num_batches_tracked")) == 1


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("loaded", [False, True])
def test_copies(loaded: bool, target: str, tmp_path: Path) -> None:
    made = program(model().eval(), target)
    bf.save(made, tmp_path / "p")
    if loaded:
        made = bf.load(tmp_path / "p", target=target)
    twin = copy.deepcopy(copy.deepcopy(made))
    assert torch.equal(twin(X[:3]), made(X[:3])) and str(bf.report(twin)) == str(bf.report(made))
    bf.save(twin, tmp_path / "q")
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()
    expected = made(X)
    with torch.no_grad():
        twin.get_parameter("0.bias").zero_()
    assert torch.equal(made(X), expected)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_program_cannot_be_pickled(loaded: bool, tmp_path: Path) -> None:
    made = program(model().eval())
    if loaded:
        bf.save(made, tmp_path / "p")
        made = bf.load(tmp_path / "p")
    for write in (pickle.dumps, lambda given: torch.save(given, io.BytesIO())):
        with pytest.raises(bf.BitfoldError, match=r"cannot be pickled.* bf\.save\(program, path\)"):
            write(made)


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_program_is_moved_and_not_cast(target: str) -> None:
    mine = model().eval()
    before, made = snapshot(mine), program(mine, target)
    expected, dtypes = made(X), {name: tensor.dtype for name, tensor in made.state_dict().items()}
    for cast in (made.bfloat16, made.half, made.double, lambda: made.to(torch.bfloat16)):
        with pytest.raises(
            bf.BitfoldError, match=r"captured in torch.float32 and cannot be cast to torch\.\w+; "
        ):
            cast()
    with pytest.raises(bf.BitfoldError, match="cannot be cast"):
        copy.copy(made).bfloat16()
    assert torch.equal(made.float()(X), expected) and torch.equal(copy.copy(made)(X), expected)
    assert {name: tensor.dtype for name, tensor in made.state_dict().items()} == dtypes
    made.to("meta")
    assert all(tensor.is_meta for tensor in made.state_dict().values()) and unchanged(mine, before)
    in_half = bf.quantize(
        mine.bfloat16(), "int8", scope="program", example_inputs=(X.bfloat16(),), target=target
    )
    assert in_half.bfloat16()(X.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(bf.BitfoldError, match=r"captured in torch\.bfloat16"):
        in_half.float()


@pytest.mark.parametrize("training", [True, False])
def test_a_program_stays_in_its_mode(training: bool, tmp_path: Path) -> None:
    made = program(model().train(training))
    bf.save(made, tmp_path / "p")
    for one in (made, bf.load(tmp_path / "p"), copy.deepcopy(made)):
        assert one.train(training) is one
        with pytest.raises(bf.BitfoldError, match=r"captured in (train|eval) mode and stays in it"):
            one.train(not training)
        if training:
            with pytest.raises(bf.BitfoldError, match=r"call model\.eval\(\) before"):
                one.eval()


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_the_report_of_a_program_is_that_of_the_model(target: str) -> None:
    mine = model().eval().bfloat16()
    made = bf.quantize(mine, "int4[g32]", scope="program", example_inputs=(X.bfloat16(),), target=target)
    ours, theirs = bf.report(made), bf.report(bf.quantize(mine, "int4[g32]", target=target))
    assert [(layer.format, layer.shape, layer.bytes_before, layer.bytes_after) for layer in ours.layers] == [
        (layer.format, layer.shape, layer.bytes_before, layer.bytes_after) for layer in theirs.layers
    ]
    assert theirs.other_bytes - ours.other_bytes == 8  # a count of batches that evaluation does not read


def test_a_norm_without_statistics_is_no_training() -> None:
    mine = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32, track_running_stats=False)).eval()
    assert program(mine).eval().training is False


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.fc(self.embed(tokens)))  # type: ignore[no-any-return]

    mine = Tied().eval()
    made = bf.quantize(mine, "int8", scope="program", example_inputs=(torch.arange(9),), target="reference")
    floats = [p for _, p in made.named_parameters() if p.shape == (9, 32)]
    assert len(floats) == 1 and floats[0] is not mine.embed.weight
    assert floats[0].data_ptr() == mine.embed.weight.data_ptr()


@pytest.mark.parametrize("asked", [("int4[g32]", "gptq"), ("int8_static", None)])
def test_a_model_in_train_mode_is_measured_in_evaluation(asked: tuple[str, str | None]) -> None:
    recipe, algorithm = asked
    made = []
    for mode in (True, False):
        mine = model().train(mode)
        before = snapshot(mine)
        batches = [X * 3 + 1, X]
        one = bf.quantize(mine, recipe, scope="program", algorithm=algorithm, calibration=batches)
        assert unchanged(mine, before)
        made.append({name: value for name, value in one.state_dict().items() if "tracked" not in name})
        if mode:
            one(X)  # the program still trains, and counts
            assert int(one.get_buffer("1.num_batches_tracked")) == 1
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items() if "running" not in name)
