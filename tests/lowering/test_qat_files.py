"""Files of training on rounded numbers: a run resumes anywhere in its schedule, and what is converted needs
no code of training."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitfold as bf
from bitfold.passes.rules import Rule

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
STATIC = bf.Recipe("static", (Rule(weight="int4", input="int8[tensor]", observer="minmax"),))
HOW = bf.Qat("lsq", "clip", warmup=2, observe=5)


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        F.mse_loss(model(X), X.flip(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        bf.advance(model)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(bf.parameter_groups(model, 1e-2, 1e-3))


@pytest.mark.parametrize("at", [0, 1, 3, 7])
@pytest.mark.parametrize("scope", ["module", "program"])
def test_a_run_resumes_anywhere_in_its_schedule(scope: str, at: int, tmp_path: Path) -> None:
    options = {"scope": scope} if scope == "module" else {"scope": scope, "example_inputs": (X,)}
    whole = bf.prepare_qat(made(), STATIC, HOW, **options)
    optimizer = optimizer_of(whole)
    run(whole, optimizer, at)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    run(whole, optimizer, 8 - at)
    saved = torch.load(tmp_path / "run.pt")
    again = bf.prepare_qat(made(), STATIC, HOW, state=saved["model"], **options)
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(saved["optimizer"])
    run(again, optimizer, 8 - at)
    ours, theirs = again.state_dict(), whole.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        expected = whole.eval()(X)
        assert torch.equal(bf.convert(again.eval(), target="reference")(X), expected)


OTHERS = {
    "format": ("int2", bf.Qat("lsq"), r"prepared as '.*weight int2 lsq', and .* as '.*weight int4 lsq'"),
    "gradient": ("int4", bf.Qat("pact"), "weight_end|weight int4 pact"),
    "schedule": ("int4", bf.Qat("lsq", rate=0.5), "rate 0.5"),
}


@pytest.mark.parametrize("scope", ["module", "program"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_another_recipe_or_other_options_is_refused(other: str, scope: str) -> None:
    given = {"scope": scope} if scope == "module" else {"scope": scope, "example_inputs": (X,)}
    state = bf.prepare_qat(made(), "int4[row]", bf.Qat("lsq"), **given).state_dict()
    text, how, says = OTHERS[other]
    fresh = made()
    with pytest.raises(bf.BitfoldError, match=says):
        bf.prepare_qat(fresh, f"{text}[row]", how, state=state, **given)
    assert type(fresh[0]) is nn.Linear and not fresh._forward_hooks
    if other != "gradient":
        with pytest.raises(bf.BitfoldError, match=says):
            bf.prepare_qat(fresh, f"{text}[row]", how, **given).load_state_dict(state)
    # How a rounding is computed is no other number.
    again = bf.prepare_qat(made(), "int4[row]", bf.Qat("lsq+keep", start="clip"), state=state, **given)
    assert torch.equal(again(X), bf.prepare_qat(made(), "int4[row]", bf.Qat("lsq"), **given)(X))


def test_a_state_of_what_was_wrapped() -> None:
    compiled = torch.compile(made(), backend="eager")
    bf.prepare_qat(compiled, "int4[row]", bf.Qat("lsq"))
    for state in (compiled.state_dict(), nn.ModuleDict({"module": compiled._orig_mod}).state_dict()):
        again = bf.prepare_qat(
            torch.compile(made(), backend="eager"), "int4[row]", bf.Qat("lsq"), state=state
        )
        assert torch.equal(again(X), compiled(X))


class Stateful(nn.Linear):
    """A linear with a state of its own beside its tensors."""

    seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_an_extra_state_of_the_users_goes_along() -> None:
    model = nn.Sequential(Stateful(16, 16))
    model[0].seen = 3
    bf.prepare_qat(model, "int4[row]")
    again = bf.prepare_qat(nn.Sequential(Stateful(16, 16)), "int4[row]", state=model.state_dict())
    assert again[0].seen == 3
    with pytest.raises(bf.BitfoldError, match="int2"):
        bf.prepare_qat(nn.Sequential(Stateful(16, 16)), "int2[row]", state=model.state_dict())


LOAD = """
import sys
import torch
from torch import nn
import bitfold as bf
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
into = {{"into": model}} if {module} else {{}}
model = bf.load({file!r}, target="reference", **into)
x, expected = torch.load({data!r})
with torch.no_grad():
    assert torch.equal(model(x), expected)
parts = ("bitfold.lowering.qat", "bitfold.passes.training.")
training = {{name for name in sys.modules if name.startswith(parts)}}
# Folding begins with the one; the other flips what a program does in `.train()`.
used = {{f"bitfold.passes.training.{{name}}" for name in ("fake_quantize", "mode")}}
assert training - {{"bitfold.passes.training"}} <= used, training
"""


@pytest.mark.parametrize("scope", ["module", "program"])
def test_what_is_converted_loads_without_the_code_of_training(scope: str, tmp_path: Path) -> None:
    options = {"scope": scope} if scope == "module" else {"scope": scope, "example_inputs": (X,)}
    model = bf.prepare_qat(made(), STATIC, HOW, **options)
    with pytest.raises(bf.BitfoldError):
        bf.save(model, tmp_path / "prepared.safetensors")
    run(model, optimizer_of(model), 4)
    with torch.no_grad():
        expected = model.eval()(X)
    converted = bf.convert(model, target="reference")
    bf.save(converted, tmp_path / "model.safetensors")
    torch.save((X, expected), tmp_path / "data.pt")
    text = LOAD.format(
        file=str(tmp_path / "model.safetensors"), data=str(tmp_path / "data.pt"), module=scope == "module"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", text], check=True)


def test_the_cpu_target_gives_what_trained_within_rounding(tmp_path: Path) -> None:
    """int4 weights, float activations: 32 terms of float32 in another order, 32 * 2**-24 of sums below 8."""
    model = bf.prepare_qat(made(), "int4[g16]", bf.Qat("lsq"))
    run(model, optimizer_of(model), 4)
    with torch.no_grad():
        expected = model.eval()(X)
        bf.convert(model, target="cpu")
        assert torch.allclose(model(X), expected, atol=32 * 2**-24 * 8)
