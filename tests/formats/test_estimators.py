"""Gradients that a user adds: one class, by name, in every text; what its file says, a kernel does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ewgs_estimator import Ewgs
from torch import Tensor, nn

import bitfold as bf
from bitfold.formats import Format, FormatError, estimators, format, learned
from bitfold.formats.estimators import ESTIMATORS, Back, Estimator
from bitfold.formats.gradient import Gradient

OP = torch.ops.bitfold.train_quantize
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


class Width(Estimator):
    """A learned width of the whole range, of formats whose ends are known: twice what `pact` learns."""

    name = "width"
    learns = ("width",)

    def start(self, fmt: Format, scales: Any) -> tuple[Tensor, ...]:
        return (learned.learned(fmt, scales)[0] * self._steps(fmt),)

    def scales(self, fmt: Format, held: Any) -> tuple[Tensor, ...]:
        return learned.stored(fmt, (held[0] / self._steps(fmt),))

    def for_x(self, back: Back) -> Tensor:
        return back.flow

    def for_held(self, back: Back) -> tuple[Tensor, ...]:
        return (back.flow * back.value / back.step / self._steps(back.format),)

    @staticmethod
    def _steps(fmt: Format) -> float:
        return fmt.element.high - fmt.element.low


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(estimators, "_registered", {})
    with torch.compiler.config.patch(cache_key_tag=torch.compiler.config.cache_key_tag):
        bf.register_estimator(Ewgs())
        bf.register_estimator(Width())
        yield


def test_it_prints_and_parses_like_those_that_are_there() -> None:
    assert str(Gradient("ewgs")) == "ewgs:0.1"
    assert Gradient.parse("ewgs:2e-7+keep") == Gradient("ewgs", 2e-7, keep=True)
    assert Gradient.parse(str(Gradient("ewgs", 1e20))) == Gradient("ewgs", 1e20)
    assert Gradient("width").learns and not Gradient("ewgs").learns
    with pytest.raises(FormatError, match=r"one of straight, .*, ewgs, width, not 'widht'"):
        Gradient("widht")


@pytest.mark.parametrize("compiled", [False, True])
def test_its_gradients_are_those_that_it_says(compiled: bool) -> None:
    def rounding(x: Tensor) -> Tensor:
        return OP(x, "int4[g16]", "ewgs:0.5", [])

    x, flow = X.clone().requires_grad_(), torch.randn_like(X)
    y = torch.compile(rounding, backend="aot_eager", fullgraph=True)(x) if compiled else rounding(x)
    y.backward(flow)
    step = format("int4[g16]").choose(X)[0].float()
    wanted = flow * (1 + 0.5 * flow.sign() * (X - y.detach()) / step)
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("scope", ["module", "program"])
def test_what_it_trains_converts_bit_for_bit(scope: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    made = bf.prepare_qat(model, "int4[g16]", bf.Qat("width", "ewgs"), scope=scope, example_inputs=(X,))
    names = [name for name, _ in made.named_parameters() if name.endswith("width")]
    assert len(names) == 2 and len(bf.parameter_groups(made, 0.1)[1]["params"]) == 2
    made.train()
    before = [made.get_parameter(name).detach().clone() for name in names]
    for _ in range(3):
        made(X).square().mean().backward()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    assert all(
        not torch.equal(made.get_parameter(name), old) for name, old in zip(names, before, strict=True)
    )
    wanted = made.eval()(X)
    assert torch.equal(bf.convert(made, target="reference")(X), wanted)


class _Silent(Estimator):
    """Learns, and does not say how."""

    name = "silent"
    learns = ("step",)

    def for_x(self, back: Back) -> Tensor:
        return back.flow


class _Broken(_Silent):
    """Other shapes and counts than it promises."""

    name = "broken"

    def __init__(self, *learns: str, sums: int = 1, columns: int | None = None) -> None:
        self.learns, self.sums, self.columns = learns, sums, columns  # type: ignore[misc]

    def for_x(self, back: Back) -> Tensor:
        return back.flow[..., : self.columns]

    def for_held(self, back: Back) -> tuple[Tensor, ...]:
        return (back.flow,) * self.sums


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (_Broken("step", "low"), r"broken learns step, low .*start\(\) gives 1"),
        (_Broken("step", sums=2), r"broken learns 1 .*for_held\(\) gives 2"),
        (_Broken(columns=3), r"broken gives a gradient of .*one for each"),
    ],
)
def test_a_broken_promise_is_one_sentence_with_its_name(given: Estimator, said: str) -> None:
    bf.register_estimator(given)
    with pytest.raises(FormatError, match=said):
        model = bf.prepare_qat(nn.Sequential(nn.Linear(16, 4)), "int4[g16]", bf.Qat("broken"))
        model(X).sum().backward()


class _Named(Estimator):
    def __init__(self, name: Any, *learns: str, identity: bool = False, number: Any = None) -> None:
        self.name, self.learns, self.identity, self.number = name, learns, identity, number  # type: ignore[misc]

    def for_x(self, back: Back) -> Tensor:
        return back.flow


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (_Named("lsq"), "'lsq' is taken"),
        (_Named("ewgs"), "'ewgs' is taken"),
        (_Named("a+b"), "letters, digits and underscores"),
        (_Named("forward"), "other than forward"),
        (_Named(None), "not None"),
        (_Named("mine", "my_step"), "one word"),
        (_Named("mine", "x"), "one word"),
        (_Named("mine", "a", "a"), "one word"),
        (_Named("mine", "a", identity=True), "cannot learn"),
        (_Named("mine", number=float("nan")), "finite"),
        (_Named("mine", number="x"), "an int or a float, not 'x'"),
        (_Named("mine", identity=True), "nothing would read"),
        (_Silent(), r"silent learns step, and has no for_held\(\)"),
        (Ewgs, "made, can be registered"),
    ],
)
def test_what_cannot_be_registered_is_one_sentence(given: Any, said: str) -> None:
    before = estimators.known()
    with pytest.raises(FormatError, match=said):
        bf.register_estimator(given)
    assert estimators.known() == before


def test_an_entry_point_is_loaded_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def load(self) -> Estimator:
            return _Named("found")

    asked: list[dict[str, str]] = []

    def entry_points(**given: str) -> list[Entry]:
        asked.append(given)
        return [Entry()] if given == {"group": "bitfold.estimators", "name": "found"} else []

    monkeypatch.setattr(estimators, "entry_points", entry_points)
    tag = torch.compiler.config.cache_key_tag
    assert Gradient.parse("found").name == "found" and len(asked) == 1
    assert Gradient.parse("found").name == "found" and len(asked) == 1
    assert torch.compiler.config.cache_key_tag != tag  # compile caches know operators by names alone
    with pytest.raises(FormatError, match="not 'lost'"):
        Gradient.parse("lost")


def test_caches_know_the_files_of_those_that_are_there() -> None:
    from bitfold.formats.cache_tag import sources

    assert all(f"class {type(one).__name__}(Estimator)" in sources() for one in ESTIMATORS.values())
