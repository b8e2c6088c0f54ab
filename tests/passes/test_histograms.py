"""Observers that search: the chosen range against every other one on the numbers themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.passes import observer, observer_names
from bitfold.passes.observing import kinds
from bitfold.passes.observing.histograms import Histogram
from bitfold.passes.observing.observers import MinMax


def seen(text: str, *batches: Tensor) -> Histogram:
    found = observer(text)
    for batch in batches:
        assert found(batch) is batch
    assert found.seen == len(batches)
    return found  # type: ignore[return-value]


def error(fmt: bf.Format, params: tuple[Tensor, ...], x: Tensor) -> float:
    rows = x.reshape(1, -1)
    rounded = fmt.fake_quantize(rows, tuple(part.reshape(1, 1) for part in params))
    return float((rows - rounded).double().square().mean())


def heavy_tailed(count: int = 200_000) -> Tensor:
    """Normal numbers, one in a thousand of them twenty times as large."""
    x = torch.randn(count)
    x[::1000] *= 20
    return x


FORMATS = ["int8[tensor]", "int4[tensor]", "int8[tensor,zero]", "uint4[tensor,zero]", "float8_e4m3fn[tensor]"]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_mse_is_no_worse_than_any_range(fmt: str, shift: float) -> None:
    """Against the error of the numbers themselves, not of bins; ranges that it tries and those between."""
    wanted, x = bf.format(fmt), heavy_tailed() + shift
    found = error(wanted, seen("mse", x[:100_000], x[100_000:]).params(wanted), x)
    low, high = x.min(), x.max()
    others = [
        error(wanted, wanted.from_range(low * a, high * b), x)
        for a in (1.0, 0.6, 0.3, 0.15, 0.08)
        for b in (1.0, 0.6, 0.3, 0.15, 0.08)
    ]
    # A bin is a thousandth of the reach: a clipped number is told wrong by half of one, and where both ends
    # are free, they are tried a twentieth apart.
    assert found <= min(others) * 1.05
    assert found <= error(wanted, seen("minmax", x).params(wanted), x) * 1.001


def test_mse_cuts_outliers_that_four_bits_cannot_afford() -> None:
    fmt, x = bf.format("int4[tensor]"), heavy_tailed()
    clipped, whole = (error(fmt, seen(text, x).params(fmt), x) for text in ("mse", "minmax"))
    assert clipped < whole / 2


@pytest.mark.parametrize("text", ["mse", "entropy"])
def test_nothing_is_cut_where_every_number_counts_alike(text: str) -> None:
    fmt, x = bf.format("int8[tensor]"), torch.linspace(-3, 3, 100_001)
    (scale,) = seen(text, x).params(fmt)
    assert float(scale) == pytest.approx(3 / 127.5, rel=0.02)


def test_entropy_cuts_a_lonely_outlier() -> None:
    fmt, x = bf.format("int8[tensor]"), torch.randn(100_000)
    x[0] = 100.0
    (scale,) = seen("entropy", x).params(fmt)
    assert 3 / 127.5 < float(scale) < 20 / 127.5
    rest = x[1:]
    assert error(fmt, (scale,), rest) < error(fmt, seen("minmax", x).params(fmt), rest) / 20


def test_entropy_is_the_divergence_that_its_definition_gives() -> None:
    """One candidate by hand: sixteen bins in four codes of two bits, of a histogram of known counts."""
    found = observer("entropy")
    assert isinstance(found, Histogram)
    found.counts = torch.tensor([8, 0, 2, 4, 6, 2, 0, 0, 1, 3, 5, 7, 2, 2, 0, 9], dtype=torch.float64)
    codes = torch.arange(16) // 4
    inside = torch.ones(16, dtype=torch.bool)
    inside[12:] = False
    found.counts[8] = 3  # which is the middle bin, no larger than the next one: nothing is taken for zeros
    clipped = found.counts.clone()
    clipped[11] += clipped[12:].sum()
    clipped[12:] = 0
    spread = torch.zeros(16, dtype=torch.float64)
    for code in range(3):
        mine = (codes == code) & (found.counts > 0)
        spread[mine] = found.counts[codes == code].sum() / mine.sum()
    p, q = clipped / clipped.sum(), spread / spread.sum()
    q = (q + 1e-4 / 16) / (1 + 1e-4)
    want = sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True) if a > 0)
    assert found.loss(codes.float(), inside) == pytest.approx(want, rel=1e-9)  # type: ignore[attr-defined]


def test_entropy_does_not_count_zeros_as_lost() -> None:
    """Behind a ReLU half of all numbers are zero."""
    fmt, x = bf.format("int8[tensor]"), torch.relu(torch.randn(200_000))
    (scale,) = seen("entropy", x).params(fmt)
    assert error(fmt, (scale,), x) < 4 * error(fmt, seen("mse", x).params(fmt), x)


@pytest.mark.parametrize("text", ["mse", "entropy", "percentile"])
def test_the_order_of_batches_does_not_matter(text: str) -> None:
    fmt, batches = bf.format("int8[tensor]"), [torch.randn(5000) * size for size in (1.0, 8.0, 0.5)]
    one, other = (seen(text, *order).params(fmt)[0] for order in (batches, batches[::-1]))
    assert float(one) == pytest.approx(float(other), rel=0.02)


def test_moving_is_the_average_that_its_definition_gives() -> None:
    batches = [torch.randn(100) for _ in range(6)]
    low, high = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        low, high = 0.75 * low + 0.25 * batch.min(), 0.75 * high + 0.25 * batch.max()
    found = seen("moving:0.25", *batches).range()
    torch.testing.assert_close(torch.stack(found), torch.stack([low, high]))


@pytest.mark.parametrize("text", ["mse", "entropy", "moving"])
def test_zeros_alone(text: str) -> None:
    for fmt in ("int8[tensor]", "int8[tensor,zero]"):
        params = seen(text, torch.zeros(10)).params(bf.format(fmt))
        assert all(bool(part.isfinite().all()) for part in params)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mse:3", "takes no option"),
        ("entropi", "did you mean 'entropy'"),
        ("moving:2", "above 0 and at most 1"),
        ("moving:x", "a share is a number"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(bf.BitfoldError, match=message):
        observer(text)


@pytest.mark.parametrize("text", ["mse", "entropy", "moving"])
def test_a_recipe_takes_them(text: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 16))
    rule = bf.Rule("*", weight="int8", input="int8[tensor]", observer=text)
    data = [torch.randn(2000, 32) for _ in range(4)]
    want = model(data[0])
    bf.quantize(model, bf.Recipe("r", (rule,)), calibration=data, target="reference")
    # What is cut is cut for the good of the rest: the sum of squares is what counts.
    assert float((model(data[0]) - want).square().mean()) < 1e-3 * float(want.square().mean())


@pytest.mark.parametrize("kind", ["percentile", "mse", "entropy"])
def test_the_least_number_of_float32_is_a_number(kind: str) -> None:
    """An additive mask has it; reach doubles past the largest one."""
    least = torch.tensor([0.0, torch.finfo(torch.float32).min])
    found = seen(kind, torch.randn(100), least)
    assert bool(torch.isfinite(torch.stack(found.range())).all())
    assert bool(torch.isfinite(torch.stack(found.params(bf.format("int8[tensor]")))).all())


def test_observers_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_registered", {})

    class Most(MinMax):
        """That many of a batch's numbers, from the first on."""

        number = "how many is a number such as 3"

        def __init__(self, most: float = 2) -> None:
            super().__init__()
            self.most = int(most)

        def note(self, x: Tensor) -> None:
            super().note(x.flatten()[: self.most])

    with pytest.raises(bf.BitfoldError, match="unknown observer 'most'"):
        observer("most")
    bf.register_observer("most", Most)
    bf.register_observer("most", Most)  # a module that is loaded again
    assert observer_names()[-1] == "most"
    rule = bf.Rule(weight="int8", input="int8[tensor]", observer="most:3")
    x = torch.tensor([[1.0, -2.0, 3.0, 50.0]]).repeat(1, 8)
    quantized = bf.quantize(nn.Sequential(nn.Linear(32, 8)), bf.Recipe("mine", (rule,)), calibration=[x])
    (scale,) = (
        value for name, value in quantized.state_dict().items() if "input" in name and value.numel() == 1
    )
    assert float(scale) == pytest.approx(3.0 / 127.5, rel=1e-2)
    with pytest.raises(bf.BitfoldError, match="how many is a number such as 3"):
        observer("most:few")
    with pytest.raises(bf.BitfoldError, match="is MinMax already"):
        bf.register_observer("minmax", Most)
    other = type("Most", (Most,), {"__module__": "another.package"})
    with pytest.raises(bf.BitfoldError, match="is Most already"):
        bf.register_observer("most", other)
    with pytest.raises(bf.BitfoldError, match="is MinMax already"):
        bf.register_observer("minmax", type("MinMax", (Most,), {}))
    for name in ("mo:st", 3):
        with pytest.raises(bf.BitfoldError, match="letters, digits"):
            bf.register_observer(name, Most)  # type: ignore[arg-type]
    with pytest.raises(bf.BitfoldError, match="subclass of Observer"):
        bf.register_observer("linear", nn.Linear)


def test_documents_name_every_observer() -> None:
    root = Path(__file__).parents[2]
    for text in (
        str(bf.Rule.__doc__),
        (root / "docs/notes/calibration.md").read_text(),
        (root / "README.md").read_text(),
    ):
        assert all(name in text for name in observer_names())


@pytest.mark.parametrize("ends", [(1.0, -1.0), (float("nan"), 1.0), (torch.zeros(4), torch.ones(4))])
def test_what_is_no_range_is_refused(ends: tuple[Any, Any]) -> None:
    class Own(MinMax):
        def range(self) -> tuple[Any, Any]:
            return ends

    own = Own()
    own(torch.ones(3))
    with pytest.raises(bf.BitfoldError, match="the observer Own gives what is observed the range"):
        own.params(bf.format("int8[tensor]"))
