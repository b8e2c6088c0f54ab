"""Pipelines as text: round trip, and one clear sentence for each mistake."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import GraphModule

from bitfold.formats.errors import BitfoldError
from bitfold.passes import Pass, Pipeline, find_pass, pass_names, register_pass


class Colour(Enum):
    red = 1
    blue = 2


@register_pass
@dataclass(frozen=True)
class Painted(Pass):
    name: ClassVar[str] = "painted"
    text: str = "plain"
    count: int = 0
    rate: float = 0.5
    on: bool = False
    limit: int | None = None
    names: tuple[str, ...] = ()
    mode: Literal["fast", "slow"] = "fast"
    colour: Colour = Colour.red

    def apply(self, gm: GraphModule) -> int:
        return 0


@dataclass(frozen=True)
class Offered(Pass):
    name: ClassVar[str] = "offered"

    def apply(self, gm: GraphModule) -> int:
        return 0


@register_pass
@dataclass(frozen=True)
class Needy(Pass):
    name: ClassVar[str] = "needy"
    amount: int

    def apply(self, gm: GraphModule) -> int:
        return self.amount


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("painted", (Painted(),)),
        ("painted,painted", (Painted(), Painted())),
        (" painted { text = int4[g64] , count=3 } , needy{amount=2}", (Painted("int4[g64]", 3), Needy(2))),
        ("painted{on=true,limit=none,rate=1e-3}", (Painted(on=True, rate=1e-3),)),
        ("painted{limit=7,colour=blue,mode=slow}", (Painted(limit=7, colour=Colour.blue, mode="slow"),)),
        ('painted{names=[a,"b,c",d[1,2]]}', (Painted(names=("a", "b,c", "d[1,2]")),)),
        ('painted{text="a, {b} \\"c\\""}', (Painted('a, {b} "c"'),)),
        ("", ()),
    ],
)
def test_parse(text: str, passes: tuple[Pass, ...]) -> None:
    assert Pipeline.parse(text).passes == passes


PAINTED = st.builds(
    Painted,
    text=st.text(),
    count=st.integers(),
    rate=st.floats(allow_nan=False),
    on=st.booleans(),
    limit=st.none() | st.integers(),
    names=st.lists(st.text()).map(tuple),
    mode=st.sampled_from(["fast", "slow"]),
    colour=st.sampled_from(Colour),
)


@given(st.lists(PAINTED, max_size=3))
def test_what_prints_parses_back(passes: list[Painted]) -> None:
    pipeline = Pipeline([*passes, Needy(3)])
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_defaults_are_not_printed() -> None:
    assert str(Pipeline([Painted(count=2), Painted()])) == "painted{count=2},painted"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("paintd", "there is no pass 'paintd'; did you mean 'painted'"),
        ("normalise", "did you mean 'normalize'"),
        ("painted{cuont=1}", "the pass 'painted' has no option 'cuont'; did you mean 'count'"),
        ("painted{count=1,count=2}", "'count' of 'painted' is given twice"),
        ("painted{count=many}", "painted{count} is 'many'; it must be a whole number"),
        ("painted{rate=many}", "painted{rate} is 'many'; it must be a number"),
        ("painted{on=perhaps}", "painted{on} is 'perhaps'; it may be true, false"),
        ("painted{mode=medium}", "painted{mode} is 'medium'; it may be fast, slow"),
        ("painted{colour=green}", "painted{colour} is 'green'; it may be red, blue"),
        ("painted{count}", "'count' in 'painted{count}' is not an option"),
        ("painted{text=a]}", "the brackets in"),
        ('painted{text="a}', "the quotes in"),
        ("needy", "the pass 'needy' needs amount"),
    ],
)
def test_mistakes_get_one_sentence(text: str, says: str) -> None:
    with pytest.raises(BitfoldError) as error:
        Pipeline.parse(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pipeline_holds_passes_only() -> None:
    with pytest.raises(TypeError, match=r"Pipeline\.parse"):
        Pipeline(["painted"])  # type: ignore[list-item]


def test_every_built_in_name_finds_its_pass() -> None:
    for name in pass_names():
        assert find_pass(name).name == name


def test_a_package_offers_passes_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def __init__(self, name: str, value: object) -> None:
            self.name, self.load = name, lambda: value

    offered = [Point("offered", Offered), Point("wrong", int)]

    def entry_points(group: str, name: str | None = None) -> list[Point]:
        assert group == "bitfold.passes"
        return [point for point in offered if name in (None, point.name)]

    monkeypatch.setattr("bitfold.passes.registry.entry_points", entry_points)
    assert Pipeline.parse("offered").passes == (Offered(),)
    assert "offered" in pass_names()
    with pytest.raises(BitfoldError, match=r"'wrong' of group bitfold.passes is .*, not a Pass"):
        Pipeline.parse("wrong")


def test_a_name_is_given_once() -> None:
    with pytest.raises(BitfoldError, match="'normalize' exists already"):

        @register_pass
        @dataclass(frozen=True)
        class Mine(Pass):
            name: ClassVar[str] = "normalize"

            def apply(self, gm: GraphModule) -> int:
                return 0


def test_a_name_is_an_identifier() -> None:
    with pytest.raises(BitfoldError, match="identifier"):

        @register_pass
        @dataclass(frozen=True)
        class Mine(Pass):
            name: ClassVar[str] = "two words"

            def apply(self, gm: GraphModule) -> int:
                return 0
