"""Training on rounded numbers as a program: modes, batch norm folded the way that trains, compiled steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from qat_cases import classify
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bitfold as bf
from bitfold.passes import Pipeline, snapshot
from bitfold.passes.annotate import Annotate
from bitfold.passes.batch_norm import FoldBatchNorm
from bitfold.passes.fold import Fold
from bitfold.passes.rules import Rule

X = torch.randn(6, 3, 7, 7, generator=torch.Generator().manual_seed(0))
WANTED = torch.arange(6) % 4
RECIPE = bf.Recipe("all", (Rule(op="*", weight="int4"),))
STATIC = bf.Recipe("static", (Rule(op="*", weight="int8", input="int8[tensor]", observer="minmax"),))


class Net(nn.Module):
    """Two convolutions with batch norm, one of them grouped and with a bias; dropout; a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.first = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, groups=2)
        self.second = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.one(x)))
        x = F.relu(self.second(self.two(x)))
        return self.head(self.drop(x.mean((2, 3))))


def made(dropout: float = 0.2) -> Net:
    torch.manual_seed(0)
    model = Net()
    model.drop.p = dropout
    for norm in (model.first, model.second):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_var.uniform_(0.5, 2.0)
        norm.running_mean.normal_()
    return model


def train(model: nn.Module, steps: int, lr: float = 1e-2) -> list[float]:
    return classify(model, X, WANTED, steps, lr)


def prepared(how: bf.Qat, recipe: bf.Recipe = RECIPE, model: nn.Module | None = None) -> nn.Module:
    data = {"calibration": [X]} if recipe is STATIC else {"example_inputs": (X,)}
    return bf.prepare_qat(model or made(), recipe, how, scope="program", dynamic="batch", **data)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("recipe", [RECIPE, STATIC], ids=["int4", "static"])
@pytest.mark.parametrize("gradient", ["straight", "lsq"])
def test_what_trained_is_what_is_converted(gradient: str, recipe: bf.Recipe, fold: bool) -> None:
    model = made()
    own = {id(p) for p in model.parameters()}
    gm = prepared(bf.Qat(gradient, gradient, fold_norm=fold), recipe, model)
    assert own <= {id(p) for p in gm.parameters()}
    losses = train(gm, 15)
    assert losses[-1] < losses[0]
    gm.eval()
    with torch.no_grad():
        expected = gm(X[:3])
        program = bf.convert(gm, target="reference")
        assert torch.equal(program(X[:3]), expected)
    assert ("fold_norm" in str(snapshot(gm))) == fold
    assert ("batch_norm" in str(snapshot(program))) == (not fold)
    gm.train()  # the prepared program is left as it was
    train(gm, 1)


def test_modes_flip_dropout_batch_norm_and_rounding() -> None:
    gm = prepared(bf.Qat("straight+stochastic"))
    assert gm.training and not torch.equal(gm(X), gm(X))
    before = gm.get_buffer("first.running_mean").clone()
    gm.eval()
    assert not gm.training and torch.equal(gm(X), gm(X))
    assert torch.equal(gm.get_buffer("first.running_mean"), before)
    gm.train()
    gm(X)
    assert not torch.equal(gm.get_buffer("first.running_mean"), before)
    twin = copy.deepcopy(gm)
    twin.eval()
    assert gm.training and not twin.training
    assert torch.equal(twin(X), twin(X))


def test_in_floats_the_folded_batch_norm_is_batch_norm() -> None:
    """During warmup nothing is rounded: outputs, gradients and statistics are those of the model itself.

    y / g * g costs three float32 roundings a number and 36 terms are added: 1e-4 of numbers near 1.
    """
    model = made(dropout=0.0)
    gm = prepared(bf.Qat(warmup=10), model=copy.deepcopy(model))
    for one in (model, gm):
        one.train()
        F.cross_entropy(one(X), WANTED).backward()
    theirs = dict(gm.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(theirs[name].grad, parameter.grad, atol=1e-4), name
    for name in ("running_mean", "running_var"):
        assert torch.allclose(gm.get_buffer(f"second.{name}"), model.second.get_buffer(name), atol=1e-5)
    assert torch.allclose(gm(X), model(X), atol=1e-4)


def test_statistics_stand_still_after_the_chosen_step() -> None:
    gm = prepared(bf.Qat(freeze_norm=2), model=made(dropout=0.0))
    seen = []
    for _ in range(4):
        train(gm, 1)
        seen.append(gm.get_buffer("first.running_mean").clone())
    assert (
        not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])
    )
    with torch.no_grad():
        # Training then sees what evaluation sees.
        assert torch.equal(gm(X), gm.eval()(X))


def test_without_training_the_codes_are_those_of_the_pass_that_folds_batch_norm() -> None:
    model = made().eval()
    program = bf.convert(prepared(bf.Qat(), model=model), target="reference")
    gm = bf.capture(model, (X,), dynamic="batch")
    Pipeline([FoldBatchNorm(), Annotate(RECIPE), Fold()]).run(gm)
    with torch.no_grad():
        assert torch.equal(program(X), gm(X))


@pytest.mark.parametrize("scope", ["module", "program"])
def test_a_compiled_step_breaks_nowhere_and_is_compiled_once(scope: str) -> None:
    """Forward and backward, over a schedule in which warmup, ranges and batch norm all change."""
    how = bf.Qat("lsq", "clip+stochastic", warmup=2, observe=3, freeze_norm=4)
    torch._dynamo.reset()
    model = made()
    data = {"calibration": [X]} if scope == "module" else {"calibration": [X], "dynamic": "batch"}
    model = bf.prepare_qat(model, STATIC, how, scope=scope, **data).train()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.Adam(bf.parameter_groups(model, 1e-2, 1e-3))
    seen = []
    for _ in range(6):
        loss = F.cross_entropy(step(X), WANTED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bf.advance(model)
        seen.append(loss.item())
    assert counter.frame_count == 1
    assert len(set(seen)) == 6
    held = dict(model.named_buffers())
    assert any(name.endswith("input_high") and value.isfinite().all() for name, value in held.items())


def kept(gradient: str | None) -> int:
    """Bytes that a compiled step keeps for its backward pass beside the model's own tensors."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    if gradient is not None:
        recipe = bf.Recipe("r", (Rule(weight="int4[g16]", input="mxfp8"),))
        bf.prepare_qat(model, recipe, bf.Qat(gradient))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    step = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = step(x)
    y.sum().backward()
    return sum(found.values())


@pytest.mark.parametrize("gradient", ["straight", "clip", "lsq", "pact", "smooth:3"])
def test_a_compiled_step_keeps_no_rounded_weight(gradient: str) -> None:
    """It rounds once more in its backward pass, and takes no more memory than in floats."""
    assert kept(gradient) <= kept(None)
    assert kept(gradient + "+keep") >= 2 * 64 * 64 * 4


@pytest.mark.parametrize("gradient", ["straight", "lsq", "smooth:3"])
def test_a_compiled_step_computes_what_an_eager_one_does(gradient: str) -> None:
    """By Inductor, both directions. Codes at a tie may differ where sums are added in another order, so the
    model is one whose inputs of each rounding are the same bits: a linear and its loss."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = bf.prepare_qat(nn.Sequential(nn.Linear(64, 32)), "int4[g16]", bf.Qat(gradient))
    twin = copy.deepcopy(eager)
    x = torch.randn(8, 64)
    eager(x).square().mean().backward()
    torch.compile(twin, fullgraph=True)(x).square().mean().backward()
    for one, other in zip(eager.parameters(), twin.parameters(), strict=True):
        # 64 terms in float32 in another order: 64 * 2**-24 of numbers below 1.
        assert torch.allclose(one.grad, other.grad, atol=4e-6)
