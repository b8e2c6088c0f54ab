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


def test_a_compiled_program_is_told_its_mode() -> None:
    """torch.compile's wrapper sets the flag of what it wraps before it calls `train`."""
    torch._dynamo.reset()
    gm = prepared(bf.Qat("straight+stochastic"))
    compiled = torch.compile(gm, backend="eager")
    with torch.no_grad():
        assert not torch.equal(compiled(X), compiled(X))
        compiled.eval()
        before = gm.get_buffer("first.running_mean").clone()
        assert not gm.training and torch.equal(compiled(X), compiled(X)) and torch.equal(compiled(X), gm(X))
        assert torch.equal(gm.get_buffer("first.running_mean"), before)
        compiled.train()
        assert gm.training and not torch.equal(compiled(X), compiled(X))
        gm.training = False  # as code that restores flags does
        program = bf.convert(gm, target="reference")
        assert torch.equal(program(X), program(X)) and torch.equal(program(X), gm.eval()(X))


def test_a_weight_that_is_no_number_is_not_converted() -> None:
    gm = prepared(bf.Qat("lsq"))
    with torch.no_grad():
        gm.get_parameter("head.weight")[0, 0] = float("inf")
    with pytest.raises(bf.BitfoldError, match="layer head has NaN or infinity"):
        bf.convert(gm)


class Twice(nn.Module):
    """A linear that is called on small numbers and on large ones, which are added."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.fc(100 * x)


@pytest.mark.parametrize("joints", [False, True], ids=["linears", "joints alone"])
@pytest.mark.parametrize("observe", [0, 3], ids=["calibrated", "observed"])
def test_each_input_of_a_layer_or_a_joint_has_its_own_range(observe: int, joints: bool) -> None:
    torch.manual_seed(0)
    how = {"input": "int8[tensor]", "observer": "minmax"}
    rules = [Rule(weight="int8"), Rule(op="add", **how)] if joints else [Rule(weight="int8", **how)]
    model, x, recipe = Twice(), torch.randn(16, 8), bf.Recipe("two", tuple(rules))
    given = {"example_inputs": (x,), "scope": "program", "calibration": None if observe else [x]}
    gm = bf.prepare_qat(copy.deepcopy(model), recipe, bf.Qat(observe=observe), **given).train()
    if observe:
        for _ in range(2):  # the first range is the first data's; the same data move it no more
            gm(x)
            bf.advance(gm)
        assert int(gm.clock) == 2
    highs = sorted(b.item() for name, b in gm.named_buffers() if "input_high" in name)
    assert len(highs) == 2 and 10 < highs[1] / highs[0] < 200
    with torch.no_grad():
        expected = gm.eval()(x)
        assert torch.equal(bf.convert(gm, target="reference")(x), expected)
        if not observe:
            program = bf.quantize(model, recipe, scope="program", calibration=[x], target="reference")
            assert torch.equal(program(x), expected)


def test_ranges_follow_the_data_beside_a_folded_batch_norm() -> None:
    for scope in ("program", "module"):
        given = {"example_inputs": (X,)} if scope == "program" else {}
        model = bf.prepare_qat(made(), STATIC, bf.Qat(observe=2), scope=scope, **given).train()
        train(model, 3)
        highs = [b for name, b in model.named_buffers() if "input_high" in name]
        assert len(highs) == 3 and all(bool(high.isfinite()) for high in highs)


class Recurrent(nn.Module):
    """Dropout inside of operators: of recurrent layers, of attention, of torch's attention module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(8, 8)
        if kind in ("LSTM", "GRU", "RNN"):
            self.inner = getattr(nn, kind)(8, 8, num_layers=2, dropout=0.5, batch_first=True)
        if kind == "module":
            self.inner = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.kind == "attention":
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)
        if self.kind == "module":
            return self.inner(x, x, x, need_weights=False)[0]
        return self.inner(x)[0]


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "attention", "module"])
def test_dropout_inside_of_operators_flips(kind: str) -> None:
    model, x = Recurrent(kind), torch.randn(2, 5, 8)
    model.fc.eval()
    gm = bf.prepare_qat(model, "int8", scope="program", example_inputs=(x,))
    assert model.training and not model.fc.training
    assert gm.training and not torch.equal(gm(x), gm(x)) and "dropout" not in str(bf.report(gm))
    assert not copy.deepcopy(gm).eval().training
    gm.eval()
    with torch.no_grad():
        expected = gm(x)
        assert torch.equal(gm(x), expected)
        assert torch.equal(bf.convert(gm, target="reference")(x), expected)
    gm.train()
    assert not torch.equal(gm(x), gm(x))


def test_dropout_that_only_training_calls_is_reported() -> None:
    class Returning(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, x, x)[0]  # with its weights: spelled out, dropout only in training

    model, x = nn.Sequential(nn.Linear(8, 8), Returning(8, 2, 0.5, batch_first=True)), torch.randn(2, 5, 8)
    gm = bf.prepare_qat(model, "int8", scope="program", example_inputs=(x,))
    assert "dropout 1 times more" in str(bf.report(gm).misses[0])


@pytest.mark.parametrize("tracked", [False, True])
def test_instance_norm_evaluates_and_converts(tracked: bool) -> None:
    norm = nn.InstanceNorm2d(8, track_running_stats=tracked)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    gm = bf.prepare_qat(model, RECIPE, scope="program", example_inputs=(X,)).train()
    gm(X)
    assert not tracked or bool(norm.running_mean.any())
    with torch.no_grad():
        expected = gm.eval()(X)
        assert torch.equal(bf.convert(gm, target="reference")(X), expected)


def test_what_a_graph_cannot_do_is_refused_before_it_trains() -> None:
    averaging = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None))
    with pytest.raises(bf.BitfoldError, match="batch norm 1 averages over all batches"):
        prepared(bf.Qat(), model=averaging)
    gm = prepared(bf.Qat("lsq"))
    with pytest.raises(bf.BitfoldError, match="would become"):
        gm.to(torch.bfloat16)
    assert {p.dtype for p in gm.parameters()} == {torch.float32}
    gm.to("cpu", torch.float32)


def test_learned_ranges_begin_at_calibrated_ones_though_others_are_observed() -> None:
    with pytest.raises(bf.BitfoldError, match="give calibration"):
        how = bf.Qat(activation="lsq", observe=5)
        bf.prepare_qat(made(), STATIC, how, scope="program", example_inputs=(X,))


def test_fewer_bits_are_another_program_of_the_same_model() -> None:
    model, fewer = made(), bf.Recipe("fewer", (Rule(op="*", weight="int2"),))
    given = {"scope": "program", "example_inputs": (X,)}
    gm = prepared(bf.Qat("lsq"), model=model).train()
    train(gm, 2)
    for scope in ("module", "program"):
        with pytest.raises(bf.BitfoldError, match="a program that trains already"):
            bf.prepare_qat(gm, fewer, scope=scope, example_inputs=(X,))
    again = bf.prepare_qat(model, fewer, bf.Qat("lsq"), **given).train()
    own = {id(p) for p in model.parameters()}
    assert own <= {id(p) for p in gm.parameters()} and own <= {id(p) for p in again.parameters()}
    train(again, 2)
    with torch.no_grad():
        expected = again.eval()(X)
        assert torch.equal(bf.convert(again, target="reference")(X), expected)
    bf.prepare_qat(model, RECIPE)
    with pytest.raises(bf.BitfoldError, match="prepared already, with scope='module'"):
        bf.prepare_qat(model, fewer, **given)


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


def test_learned_numbers_whose_names_a_model_has_stay_apart() -> None:
    """Each then ends in a count, which says nothing of what it is."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 8)
            self.register_buffer("fc_weight_step", torch.ones(()))
            self.register_buffer("fc_weight_low", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.fc_weight_step * self.fc_weight_low

    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    given = {"scope": "program", "example_inputs": (x,)}
    gm = bf.prepare_qat(Named(), "uint4[g32,zero]", bf.Qat("lsq"), **given)
    held = {name: one for name, one in gm.named_parameters() if name.startswith("fc_weight_")}
    assert list(held) == ["fc_weight_step_1", "fc_weight_low_1"]
    assert (held["fc_weight_step_1"] > 0).all() and (held["fc_weight_low_1"] < 0).all()
