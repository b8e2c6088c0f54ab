"""Batch norm folded into the convolution before it, in a model of modules."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from qat_cases import classify
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.folded import Folded
from bitfold.lowering.qat.prepared import Prepared
from bitfold.passes.rules import Rule

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WANTED = torch.arange(6) % 4
RECIPE = bf.Recipe("all", (Rule(op="*", weight="int4"),))
STATIC = bf.Recipe("static", (Rule(op="*", weight="int8", input="int8[tensor]", observer="minmax"),))


class Block(nn.Module):
    """Two convolutions with batch norm beside a third: what residual networks are made of."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(out)
        self.down = nn.Sequential(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out, affine=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class Net(nn.Module):
    """Its forward looks at a size, so that it cannot be traced; its blocks can."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(3, 8), Block(8, 8)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x = F.max_pool2d(x, 2) if x.shape[-1] > 4 else x
        return self.head(x.mean((2, 3)))


def made() -> Net:
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
            module.running_mean.normal_()
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model


def train(model: nn.Module, steps: int, lr: float = 1e-2) -> list[float]:
    return classify(model, X, WANTED, steps, lr)


def prepared(how: bf.Qat, recipe: bf.Recipe = RECIPE, model: nn.Module | None = None) -> nn.Module:
    data = {"calibration": [X]} if recipe is STATIC else {}
    return bf.prepare_qat(model or made(), recipe, how, **data)


@pytest.mark.parametrize("recipe", [RECIPE, STATIC], ids=["int4", "static"])
@pytest.mark.parametrize("gradient", ["straight", "lsq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_what_trained_is_what_is_converted(
    dtype: torch.dtype, gradient: str, recipe: bf.Recipe, tmp_path: Path
) -> None:
    model = made()
    names = set(model.state_dict())
    own = {id(p) for p in model.parameters()}
    prepared(bf.Qat(gradient, gradient), recipe, model)
    assert own <= {id(p) for p in model.parameters()} and names <= set(model.state_dict())
    model.to(dtype)
    x = X.to(dtype)
    if dtype is torch.float32:
        losses = train(model, 15)
        assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(x)
        bf.convert(model, target="reference")
        assert torch.equal(model(x), expected)
    block = model.blocks[0]
    assert isinstance(block.conv1, Folded) and isinstance(block.bn1, Folded)
    assert torch.equal(block.bn1(x), x)
    bf.save(model, tmp_path / "model.safetensors")
    again = bf.load(tmp_path / "model.safetensors", into=made().to(dtype).eval(), target="reference")
    with torch.no_grad():
        assert torch.equal(again(x), expected)
    twin = copy.deepcopy(again).to(torch.float32)
    with torch.no_grad():
        assert twin(X).dtype == torch.float32


def test_it_is_the_program_scope_in_another_form() -> None:
    model = made()
    how = bf.Qat("straight", freeze_norm=3)
    modules = prepared(how, model=copy.deepcopy(model))
    program = bf.prepare_qat(model, RECIPE, how, scope="program", example_inputs=(X,))
    for one in (modules, program):
        one.train()
        train(one, 6)
        one.eval()
    with torch.no_grad():
        assert torch.equal(modules(X), program(X))
    theirs = dict(program.named_buffers())
    for name, buffer in modules.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(buffer, theirs[name])


def test_in_floats_it_is_batch_norm() -> None:
    """During warmup nothing is rounded. y / g * g costs three float32 roundings a number and 72 terms are
    added, through two blocks: 1e-4 of numbers near 1."""
    model = made()
    rounded = prepared(bf.Qat(warmup=10), model=copy.deepcopy(model))
    for one in (model, rounded):
        one.train()
        F.cross_entropy(one(X), WANTED).backward()
    theirs = dict(rounded.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(theirs[name].grad, parameter.grad, atol=2e-4), name
    moved = dict(rounded.named_buffers())
    for name, buffer in model.named_buffers():
        assert name.endswith("tracked") or torch.allclose(buffer, moved[name], atol=1e-4), name


@pytest.mark.parametrize("scope", ["module", "program"])
@pytest.mark.parametrize("how", [bf.Qat(), bf.Qat(freeze_norm=3)], ids=["always", "frozen later"])
def test_a_channel_that_gamma_switches_off_can_be_switched_on_again(how: bf.Qat, scope: str) -> None:
    """The last norm of a residual block begins with zeros: int8 rows err by 2**-8 of a number, gradients of
    gamma, sums of 6 * 36 of them, by no more than that of the largest."""
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).train()
    nn.init.zeros_(floats[1].weight)
    recipe, given = bf.Recipe("all", (Rule(op="*", weight="int8"),)), {"example_inputs": (X,)}
    rounded = bf.prepare_qat(copy.deepcopy(floats), recipe, how, scope=scope, **given).train()
    wanted = torch.randn(6, 8, 6, 6)
    for model in (floats, rounded):
        (model(X) * wanted).sum().backward()
    ours, theirs = (model.get_parameter("1.weight").grad for model in (rounded, floats))
    assert theirs.abs().max() > 1 and torch.allclose(ours, theirs, atol=2**-6 * theirs.abs().max())
    ours, theirs = (model.get_buffer("1.running_var") for model in (rounded, floats))
    assert torch.allclose(ours, theirs, rtol=2**-6)
    torch.optim.SGD(rounded.parameters(), 0.1).step()
    with torch.no_grad():
        expected = rounded.eval()(X)
        assert expected.std() > 0.01
        converted = bf.convert(rounded, target="reference")
        assert torch.equal(converted(X), expected)


def test_learned_scales_begin_at_no_channel_of_zeros() -> None:
    model = made()
    nn.init.zeros_(model.blocks[0].bn2.weight)
    with pytest.raises(bf.BitfoldError, match="has zeros in its weight"):
        prepared(bf.Qat("lsq"), model=model)
    assert not any(isinstance(module, Prepared) for module in model.modules())
    state = prepared(bf.Qat("lsq")).state_dict()  # of a run that had none
    bf.prepare_qat(model, RECIPE, bf.Qat("lsq"), state=state)


def test_one_value_a_channel_is_nothing_to_normalize_by() -> None:
    model = bf.prepare_qat(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), RECIPE)
    with pytest.raises(bf.BitfoldError, match="more than one value"):
        model(torch.randn(1, 3, 3, 3))


def test_a_batch_norm_in_evaluation_mode_stands_still_while_the_rest_trains() -> None:
    model = prepared(bf.Qat("straight+stochastic")).train()
    norm = model.blocks[0].bn1
    norm.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert not torch.equal(model(X), model(X))
    after = dict(model.named_buffers())
    assert torch.equal(after["blocks.0.bn1.running_mean"], before["blocks.0.bn1.running_mean"])
    assert not torch.equal(after["blocks.0.bn2.running_mean"], before["blocks.0.bn2.running_mean"])


def test_a_batch_norm_in_training_mode_moves_while_the_rest_evaluates() -> None:
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    recipe = bf.Recipe("all", (Rule(op="*", weight="int8"),))
    rounded = bf.prepare_qat(copy.deepcopy(floats), recipe, bf.Qat("straight+stochastic"))
    for model in (floats, rounded):
        model.eval()[1].train()
    ours, theirs = rounded(5 * X), floats(5 * X)
    assert torch.allclose(ours.std((0, 2, 3)), theirs.std((0, 2, 3)), rtol=1e-3)
    assert torch.allclose(rounded[1].running_var, floats[1].running_var, rtol=2**-6)  # int8 rows
    assert not torch.allclose(rounded[1].running_var, torch.ones(8), rtol=0.1)


@pytest.mark.parametrize("scope", ["module", "program"])
@pytest.mark.parametrize(
    "name", ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
)
def test_numbers_that_are_none_are_not_converted(name: str, scope: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    made = bf.prepare_qat(model, RECIPE, scope=scope, example_inputs=(X,))
    dict([*model.named_parameters(), *model.named_buffers()])[name].data[3] = float("nan")
    with pytest.raises(bf.BitfoldError, match="NaN or infinity"):
        bf.convert(made)


def test_statistics_stand_still_after_the_chosen_step() -> None:
    model = prepared(bf.Qat(freeze_norm=2)).train()
    seen = []
    for _ in range(4):
        train(model, 1)
        seen.append(model.blocks[0].bn1.running_mean.clone())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])
    with torch.no_grad():
        assert torch.equal(model(X), model.eval()(X))


class Peeking(nn.Module):
    """Where batch norm is not what alone reads the convolution, or nobody can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


@pytest.mark.parametrize("kind", ["peeking", "twice", "momentum", "hook", "untraced"])
def test_what_cannot_be_folded_stays_and_is_reported(kind: str) -> None:
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    model: nn.Module = nn.Sequential(conv, norm)
    if kind == "peeking":
        model = Peeking()
    if kind == "twice":
        model = nn.Sequential(conv, norm, conv, norm)
    if kind == "momentum":
        norm.momentum = None
    if kind == "hook":
        conv.register_forward_hook(lambda *args: None)
    if kind == "untraced":
        model.forward = lambda x: norm(conv(x)) if x.mean() > -1e9 else x  # type: ignore[method-assign]
    bf.prepare_qat(model, RECIPE)
    found = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert not isinstance(found, Prepared)
    assert any("fold_norm" in str(miss) for miss in bf.report(model).misses)
    model(X).sum().backward()
    model.eval()
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(bf.convert(model, target="reference")(X), expected)


def test_prepared_again_copied_and_resumed() -> None:
    model = prepared(bf.Qat("lsq", freeze_norm=4)).train()
    train(model, 2)
    bf.prepare_qat(model, bf.Recipe("fewer", (Rule(op="*", weight="int2"),)), bf.Qat("lsq", freeze_norm=4))
    train(model, 1)
    twin = copy.deepcopy(model)
    assert twin.blocks[0].conv1.folded_norm[0] is twin.blocks[0].bn1
    recipe = bf.Recipe("fewer", (Rule(op="*", weight="int2"),))
    fresh = bf.prepare_qat(made(), recipe, bf.Qat("lsq", freeze_norm=4), state=model.state_dict()).train()
    for one in (model, twin, fresh):
        train(one, 3)
    with torch.no_grad():
        expected = model.eval()(X)
        for one in (twin, fresh):
            assert torch.equal(one.eval()(X), expected)
            assert torch.equal(bf.convert(one, target="reference")(X), expected)


class Watched(nn.Module):
    """Its forward writes to its buffers, its attributes and a list, and looks at more in training."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks, self.conv, self.norm = looks, nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        y = self.conv(x)
        if self.training and self.looks:
            self.last = y
        z = self.norm(y)
        self.seen.append(z)
        return z


def test_a_forward_is_read_in_both_modes_and_leaves_nothing_behind() -> None:
    for looks in (False, True):
        model = bf.prepare_qat(Watched(looks).eval(), RECIPE)
        assert isinstance(model.norm, Prepared) != looks
        assert model.steps == 0 and not model.seen and not hasattr(model, "last") and not model.training


def test_momentum_and_its_average_over_all_batches_are_those_of_the_module() -> None:
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).train()
    rounded = bf.prepare_qat(copy.deepcopy(floats), RECIPE, bf.Qat(warmup=100))
    batches = [X, 3 * X, X - 1]
    for model in (floats, rounded):
        torch.optim.swa_utils.update_bn(batches, model)
    for name in ("running_mean", "running_var"):
        ours, theirs = (getattr(model[1], name) for model in (rounded, floats))
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), name
    for model in (floats, rounded):
        assert int(model[1].num_batches_tracked) == 3 and model[1].momentum == 0.1
        model[1].momentum, model[1].eps = 0.5, 0.1
        model(2 * X)
    assert torch.allclose(rounded[1].running_var, floats[1].running_var, rtol=1e-4)
    rounded.eval()
    with torch.no_grad():
        expected = rounded(X)
        assert torch.equal(bf.convert(rounded, target="reference")(X), expected)


def test_a_batch_norm_that_left_the_model_is_noticed() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(prepared(bf.Qat()))
    for call in (bf.advance, bf.convert):
        with pytest.raises(bf.BitfoldError, match="has left the model"):
            call(model)


def test_a_conversion_that_fails_leaves_all_as_it_was() -> None:
    model = prepared(bf.Qat("lsq")).train()
    train(model, 2)
    model.eval()
    expected, scale = model(X).detach(), model.blocks[1].conv2.weight_step
    kept = scale.detach().clone()
    with torch.no_grad():
        scale[0] = float("nan")
    with pytest.raises(bf.BitfoldError, match="conv2"):
        bf.convert(model)
    with torch.no_grad():
        scale.copy_(kept)
        assert torch.equal(model(X), expected)
        assert torch.equal(bf.convert(model, target="reference")(X), expected)
