"""Batch norm that no weight before it takes in stands still from the chosen step on, too."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bitfold as bf
from bitfold.lowering.qat.prepared import Prepared

X = torch.randn(6, 8, 5, 5, generator=torch.Generator().manual_seed(0))
RECIPE = bf.Recipe("all", (bf.Rule(op="*", weight="int8"),))


class Net(nn.Module):
    """One batch norm before its convolution, one behind it, one behind a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.conv, self.behind = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
        self.fc, self.last = nn.Linear(36, 5), nn.BatchNorm1d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(self.behind(self.conv(self.before(x))).flatten(1)))  # type: ignore[no-any-return]


def made() -> Net:
    torch.manual_seed(0)
    return Net()


def prepared(model: nn.Module, how: bf.Qat, scope: str) -> nn.Module:
    given = {"scope": scope} | ({"example_inputs": (X,)} if scope == "program" else {})
    return bf.prepare_qat(model, RECIPE, how, **given).train()


def means(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("running_mean")]


def step(model: nn.Module, scale: float = 1.0) -> None:
    model(scale * X).square().sum().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    model.zero_grad()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("scope", ["module", "program"])
def test_every_batch_norm_stands_still(scope: str, fold: bool) -> None:
    model = prepared(made(), bf.Qat(freeze_norm=2, fold_norm=fold), scope)
    seen = []
    for count in range(4):
        step(model, 1.0 + count)
        bf.advance(model)
        seen.append(means(model))
    assert len(seen[0]) == 3
    for mean in zip(*seen, strict=True):
        assert not torch.equal(mean[0], mean[1]) and torch.equal(mean[1], mean[3])
    assert not bf.report(model).misses or scope == "program" or fold
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(expected, model.eval()(X))  # training sees what evaluation sees
        twin = copy.deepcopy(model)
        for one in (model, twin):
            converted = bf.convert(one, target="reference")
            assert torch.equal(converted(X), expected)
    if scope == "module":
        assert type(model.last) is nn.BatchNorm1d and type(model.before) is nn.BatchNorm2d
        assert {name for name in model.state_dict() if name.startswith("last")} == {
            f"last.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
        }


@pytest.mark.parametrize("scope", ["module", "program"])
def test_until_then_it_is_batch_norm(scope: str) -> None:
    """In floats, and nothing folded: the very operators of the model itself."""
    floats = made()
    model = prepared(copy.deepcopy(floats), bf.Qat(warmup=9, freeze_norm=9, fold_norm=False), scope)
    for one in (floats, model):
        one.train()
        for count in range(2):
            one(X + count).square().sum().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in floats.named_parameters():
        assert torch.equal(theirs[name].grad, parameter.grad), name
    moved = dict(model.named_buffers())
    for name, buffer in floats.named_buffers():
        if scope == "module" or not name.endswith("tracked"):  # a graph counts no batches
            assert torch.equal(moved[name], buffer), name


@pytest.mark.parametrize("scope", ["module", "program"])
def test_a_step_compiles_once_and_a_run_resumes(scope: str) -> None:
    torch._dynamo.reset()
    how = bf.Qat("lsq", freeze_norm=2)
    model = prepared(made(), how, scope)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    states = []
    for _ in range(4):
        states.append(copy.deepcopy(model.state_dict()))
        step(compiled)
        bf.advance(model)
    assert counter.frame_count == 1
    given = {"scope": scope} | ({"example_inputs": (X,)} if scope == "program" else {})
    again = bf.prepare_qat(made(), RECIPE, how, state=states[1], **given).train()
    for _ in range(3):
        step(again)
        bf.advance(again)
    assert all(torch.equal(one, other) for one, other in zip(means(again), means(model), strict=True))


def test_averages_over_all_batches_freeze_in_a_model_of_modules() -> None:
    model = made()
    model.last.momentum = None
    model = prepared(model, bf.Qat(freeze_norm=2), "module")
    seen = []
    for count in range(3):
        step(model, 1.0 + count)
        bf.advance(model)
        seen.append(means(model)[2])
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])


def test_what_does_not_freeze_is_reported() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for norm in (Own(5), nn.SyncBatchNorm(5)):
        model = made()
        model.last = norm
        bf.prepare_qat(model, RECIPE, bf.Qat(freeze_norm=2))
        assert not isinstance(norm, Prepared)
        assert any("its statistics move on" in str(miss) for miss in bf.report(model).misses)


def test_fewer_bits_and_a_failed_preparation() -> None:
    model = prepared(made(), bf.Qat(freeze_norm=2), "module")
    for _ in range(2):
        step(model)
        bf.advance(model)
    with pytest.raises(bf.BitfoldError, match="only the model has"):
        bf.prepare_qat(model, RECIPE, bf.Qat(freeze_norm=2), state={})
    before = means(model)
    bf.prepare_qat(model, "int4[row]", bf.Qat(freeze_norm=2))
    assert int(model.last.clock) == 2
    step(model, 3.0)
    assert all(torch.equal(one, other) for one, other in zip(means(model), before, strict=True))


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("scope", ["module", "program"])
def test_one_value_a_channel_is_refused_until_frozen_and_moves_nothing(scope: str, fold: bool) -> None:
    x = torch.ones(1, 4, 1, 1)
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))
    given = {"scope": scope} | ({"example_inputs": (x,)} if scope == "program" else {})
    model = bf.prepare_qat(net, RECIPE, bf.Qat(freeze_norm=1, fold_norm=fold), **given).train()
    with pytest.raises(bf.BitfoldError, match="more than one value a channel"):
        model(x)
    # A compiled step cannot look at the clock; it must not spoil the statistics either.
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    statistics = [buffer for name, buffer in model.named_buffers() if "running" in name]
    assert [buffer.unique().item() for buffer in statistics] == [0.0, 1.0]
    bf.advance(model)
    with torch.no_grad():
        assert torch.equal(model(x), model.eval()(x))  # frozen, one value is as good as many


def test_statistics_that_stand_still_are_not_found_anew() -> None:
    model = copy.deepcopy(prepared(made(), bf.Qat(freeze_norm=1), "module"))
    torch.optim.swa_utils.update_bn([X], model)
    bf.advance(model)
    before = means(model)
    with pytest.raises(bf.BitfoldError, match="before stand still since step 1"):
        torch.optim.swa_utils.update_bn([2 * X], model)
    with pytest.raises(bf.BitfoldError, match="behind stand still since step 1"):
        model.behind.reset_running_stats()  # which the convolution computes
    assert all(torch.equal(one, other) for one, other in zip(means(model), before, strict=True))


def test_a_freezing_batch_norm_that_was_made_anew_is_noticed() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(prepared(model, bf.Qat(freeze_norm=2), "module"))
    for call in (bf.advance, bf.convert):
        with pytest.raises(bf.BitfoldError, match="0, a batch norm that freezes, was made a SyncBatchNorm"):
            call(model)
