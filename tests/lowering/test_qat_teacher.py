"""The float model teaches the one that trains on rounded numbers."""

import copy

import pytest
import torch
from qat_cases import ALL, TOKENS, Net
from torch import Tensor, nn

import bitfold as bf


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_the_float_model_teaches_in_one_line(kind: str) -> None:
    torch.manual_seed(0)
    model = Net()
    floats = copy.deepcopy(model)
    names = set(model.state_dict())
    with pytest.raises(bf.BitfoldError, match="no teacher"):
        bf.distillation(model)
    bf.prepare_qat(model, ALL, distill=bf.Distill(kind, temperature=2.0, weight=3.0))
    added = {name for name in model.state_dict() if name not in names}
    assert all(name.endswith("_extra_state") for name in added) and len(list(model.parameters())) == len(
        list(floats.parameters())
    )
    with pytest.raises(bf.BitfoldError, match="not been called"):
        bf.distillation(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        said = model(TOKENS)
        got = bf.distillation(model)
        with torch.no_grad():
            wanted = floats(TOKENS)
        if kind == "mse":
            assert torch.allclose(got, 3 * (said - wanted).square().mean())
        else:
            p, q = (torch.softmax(t.double() / 2, -1) for t in (wanted, said))
            by_hand = 3 * 4 * (p * (p.log() - q.log())).sum(-1).mean()
            assert torch.allclose(got.double(), by_hand, rtol=1e-4)  # logarithms of float32 near each other
        got.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(got.item())
    assert losses[-1] < 0.8 * losses[0]
    twin = copy.deepcopy(model)
    twin(TOKENS)
    bf.convert(twin)
    assert not twin._forward_hooks and "bitfold_teacher" not in twin.__dict__


def test_a_teacher_compiles_with_its_model() -> None:
    torch._dynamo.reset()
    model = bf.prepare_qat(Net(), ALL, distill=bf.Distill())
    step_ = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = (model(TOKENS), bf.distillation(model))[1]
    step_(TOKENS)
    got = bf.distillation(model)
    assert torch.allclose(got, expected, atol=1e-6)
    got.backward()
    assert model.fc.weight.grad is not None


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


def test_a_teacher_of_a_model_that_is_rounded_already_is_not() -> None:
    floats, x = linears(), torch.randn(4, 32)
    model = bf.prepare_qat(copy.deepcopy(floats), "int2[g32]")
    bf.prepare_qat(model, "int2[g32]", distill=bf.Distill("mse"))
    said = model(x)
    assert torch.equal(bf.distillation(model), (said - floats(x)).square().mean()) and bf.distillation(model)


def test_a_teacher_goes_where_its_model_goes_and_is_found_in_it() -> None:
    model = nn.Sequential(bf.prepare_qat(linears(), "int4[g32]", distill=bf.Distill()))
    model.to(torch.bfloat16)(torch.randn(4, 32, dtype=torch.bfloat16))
    assert bf.distillation(model).isfinite()  # as of what DistributedDataParallel makes of it
    bf.convert(model)
    assert not model[0]._forward_hooks and "bitfold_teacher" not in model[0].__dict__


def test_a_run_that_is_resumed_has_its_own_teacher() -> None:
    x, how = torch.randn(4, 32), {"distill": bf.Distill("mse")}
    model = bf.prepare_qat(linears(), "int2[g32]", **how)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2):
        model(x)
        bf.distillation(model).backward()
        optimizer.step()
    state = copy.deepcopy(model.state_dict())
    model(x)
    again = bf.prepare_qat(linears(), "int2[g32]", state=state, **how)
    again(x)
    assert torch.equal(bf.distillation(again), bf.distillation(model))
    other = linears()
    with torch.no_grad():
        other[2].bias[0] += 1e-3
    with pytest.raises(bf.BitfoldError, match="another teacher"):
        bf.prepare_qat(other, "int2[g32]", state=state, **how)
    assert type(other[0]) is nn.Linear and not other._forward_hooks
    bf.prepare_qat(other, "int2[g32]", **how)
    with pytest.raises(bf.BitfoldError, match="another teacher"):
        other.load_state_dict(state)
    # The teacher stays that of the first preparation, though the model that is prepared anew has trained.
    anew = bf.prepare_qat(model, "int2[g32]", **how)
    assert all(torch.equal(anew.state_dict()[name], state[name]) for name in state if "extra" in name)
    # To convert, nobody need teach; and one may begin to.
    bf.convert(bf.prepare_qat(linears(), "int2[g32]", state=state))
    bf.prepare_qat(linears(), "int2[g32]", state=bf.prepare_qat(linears(), "int2[g32]").state_dict(), **how)


def test_states_of_an_earlier_and_a_later_version() -> None:
    model = bf.prepare_qat(linears(), "int2[g32]", distill=bf.Distill())
    names = [name for name in model.state_dict() if name.endswith("_extra_state")]

    def saying(said: str) -> dict[str, Tensor]:
        text = torch.tensor(list(said.encode()), dtype=torch.uint8)
        return {**model.state_dict(), **dict.fromkeys(names, text)}

    first = "weight int2[g32] straight\nwarmup 0, observe 0, rate 0.1, freeze_norm None"
    bf.prepare_qat(linears(), "int2[g32]", state=saying(first), distill=bf.Distill())
    with pytest.raises(bf.BitfoldError, match="of version 3, and this bitfold reads up to 2"):
        bf.prepare_qat(linears(), "int2[g32]", state=saying(f"version 3\n{first}"))
