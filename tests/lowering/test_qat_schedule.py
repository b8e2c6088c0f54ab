"""What a step moves on: ranges that follow the data, warmup, where learned scales begin, fewer bits."""

import copy

import pytest
import torch
from qat_cases import ALL, TOKENS, Net, loss, step
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.qat import begin
from bitfold.passes.rules import Rule

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def test_ranges_follow_the_data_for_a_while_and_then_stand_still() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    recipe = bf.Recipe("r", (Rule(weight="int8", input="int8[tensor]", observer="minmax"),))
    bf.prepare_qat(model, recipe, bf.Qat(observe=3, rate=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    for size in (1.0, 3.0, 5.0, 100.0):
        x = torch.linspace(-size, size, 16).repeat(2, 1)
        model(x)  # accumulated with the next
        step(model, x, optimizer)
        seen.append(model[0].input_high.item())
    # The first range is the first batch's; then half the way, twice; then never again.
    assert seen == [1.0, 2.0, 3.5, 3.5] and model[0].input_low.item() == -3.5
    expected = model.eval()(x).detach()
    assert torch.equal(bf.convert(model, target="reference")(x), expected)


def test_warmup_trains_in_floats_and_eval_rounds() -> None:
    torch.manual_seed(0)
    model = Net()
    floats = copy.deepcopy(model)
    bf.prepare_qat(model, ALL, bf.Qat("lsq", warmup=2))
    for count in range(3):
        assert torch.equal(model(TOKENS), floats(TOKENS)) == (count < 2)
        assert not torch.equal(model.eval()(TOKENS), floats(TOKENS))
        model.train()
        bf.advance(model)


@pytest.mark.parametrize("scope", ["module", "program"])
@pytest.mark.parametrize("gradient", ["lsq", "pact"])
def test_learned_scales_begin_at_the_weights_that_the_warmup_leaves(gradient: str, scope: str) -> None:
    """They are those of the same model, prepared only then; batch norm, tied weights and zero points too."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Net(), nn.Conv1d(5, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(112, 4))

    def prepared(model: nn.Module, warmup: int) -> nn.Module:
        text = "uint4[g16,zero]" if gradient == "lsq" else "int4[g16]"
        rules = Rule(op="*", weight=text), Rule(op="conv", weight="int4[row]")
        given = {"scope": scope} | ({"example_inputs": (TOKENS,)} if scope == "program" else {})
        how = bf.Qat(gradient, warmup=warmup, start="clip")
        return bf.prepare_qat(model, bf.Recipe("r", rules), how, **given).train()

    model = prepared(made(), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    learned = {name: p for name, p in model.named_parameters() if name.endswith(("_step", "_end", "_low"))}
    first = {name: p.detach().clone() for name, p in learned.items()}
    assert len(first) >= 4
    for _ in range(2):
        assert all(torch.equal(learned[name], numbers) for name, numbers in first.items())
        step(model, TOKENS, optimizer)
    fresh = made()
    names = set(fresh.state_dict())
    # A program names what is tied once.
    fresh.load_state_dict({name: t for name, t in model.state_dict().items() if name in names}, strict=False)
    fresh = prepared(fresh, 0)
    there = dict(fresh.named_parameters())
    assert all(torch.equal(p, there[name]) for name, p in learned.items())
    assert not any(torch.equal(p, first[name]) for name, p in learned.items())
    assert torch.equal(model.eval()(TOKENS), fresh.eval()(TOKENS))
    kept = {name: p.detach().clone() for name, p in learned.items()}
    bf.advance(model)
    assert all(torch.equal(learned[name], numbers) for name, numbers in kept.items())


def test_fewer_bits_as_training_goes_on_with_the_same_optimizer() -> None:
    torch.manual_seed(0)
    recipes = [bf.Recipe("r", (Rule(op="*", weight=f"int{b}[g16]"),)) for b in (8, 4, 2)]
    model = bf.prepare_qat(Net(), recipes[0], bf.Qat("lsq", warmup=1))
    optimizer = torch.optim.Adam(bf.parameter_groups(model, 5e-3))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for recipe in recipes:
        if recipe is not recipes[0]:
            bf.prepare_qat(model, recipe, bf.Qat("lsq", warmup=1))
        assert {id(p) for p in model.parameters()} == trained
        for _ in range(5):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
            bf.advance(model)
    assert int(model.fc.clock) == 15
    model.eval()
    with torch.no_grad():
        expected = model(TOKENS)
        bf.convert(model, target="reference")
        assert torch.equal(model(TOKENS), expected)
    assert model.fc.folded_weights[0].format.startswith("int2[g16")


def test_ranges_go_on_when_bits_change() -> None:
    def static(bits: int) -> bf.Recipe:
        return bf.Recipe("r", (Rule(weight=f"int{bits}", input="int8[tensor]", observer="minmax"),))

    model = bf.prepare_qat(Net(), static(8), calibration=[TOKENS])
    high = model.fc.input_high.clone()
    bf.prepare_qat(model, static(4))
    assert torch.equal(model.fc.input_high, high) and bool(high.isfinite())


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


def test_a_step_in_a_graph_begins_scales_by_the_clock_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CUDA graph is played here: what it holds runs without python, and no version of a tensor moves."""
    model = bf.prepare_qat(made(), "int4[g16]", bf.Qat("lsq", warmup=3))
    clock, weight, scale = (model[0].get_buffer("clock"), model[0].weight, model[0].weight_step)
    fresh, first = [], scale.detach().clone()
    bf.advance(model)
    with monkeypatch.context() as patched:
        patched.setattr(begin, "_captured", lambda clocks: True)
        for _ in range(3):
            with torch.no_grad():
                weight.mul_(2)
            fresh.append(bf.prepare_qat(twin(model), "int4[g16]", bf.Qat("lsq"))[0].weight_step)
            bf.advance(model)
            # The third step in all ends the warmup.
            assert torch.equal(scale, first if len(fresh) < 2 else fresh[1])
    assert int(clock) == 4
    for one in (model[0], model[2]):
        one.clock.numpy()[...] = 1  # a replay, of two steps less for once
    bf.advance(model)
    with torch.no_grad():
        weight.mul_(2)
    bf.advance(model)
    assert int(clock) == 3
    assert torch.equal(scale, bf.prepare_qat(twin(model), "int4[g16]", bf.Qat("lsq"))[0].weight_step)


def twin(model: nn.Module) -> nn.Sequential:
    """The float model of the same weights."""
    floats = made()
    theirs = dict(model.named_parameters())
    floats.load_state_dict({name: theirs[name].detach() for name in floats.state_dict()})
    return floats
