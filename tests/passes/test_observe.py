"""Observe and calibrate: where observers go, what they remember, and what bad data gets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bitfold as bf
from bitfold.formats import BitfoldError, format
from bitfold.passes import Pipeline, Recipe, Rule, calibrate, capture, observer, snapshot

STATIC = Recipe("static", (Rule(weight="int8", input="int8[tensor]", observer="minmax"),))


class Shared(nn.Module):
    """Two layers that read the same activation, and one that reads what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.k(x))


def observed(recipe: Recipe = STATIC, dynamic: str | None = None) -> torch.fx.GraphModule:
    gm = capture(Shared(), (torch.randn(4, 8),), dynamic=dynamic)
    Pipeline.parse(f"annotate{{recipe={_quoted(recipe)}}},observe").run(gm)
    return gm


def _quoted(recipe: Recipe) -> str:
    text = str(recipe).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def test_layers_that_read_one_activation_share_an_observer() -> None:
    assert str(snapshot(observed())) == "\n".join(
        [
            "q_weight: f32[8, 8] = self.q.weight",
            "k_weight: f32[8, 8] = self.k.weight",
            "o_weight: f32[8, 8] = self.o.weight",
            "x: f32[4, 8] = input",
            "q_input_observer: f32[4, 8] = self.q_input_observer(x)",
            "linear: f32[4, 8] = aten.linear.default(q_input_observer, q_weight)"
            "  # int8 weight, int8[tensor] input, observed by minmax",
            "linear_1: f32[4, 8] = aten.linear.default(q_input_observer, k_weight)"
            "  # int8 weight, int8[tensor] input, observed by minmax",
            "mul: f32[4, 8] = aten.mul.Tensor(linear, linear_1)",
            "o_input_observer: f32[4, 8] = self.o_input_observer(mul)",
            "linear_2: f32[4, 8] = aten.linear.default(o_input_observer, o_weight)"
            "  # int8 weight, int8[tensor] input, observed by minmax",
            "return (linear_2,)",
        ]
    )


def test_calibrated_scales_are_those_of_the_whole_data() -> None:
    gm = observed(dynamic="batch")
    batches = [torch.randn(3, 8), torch.randn(5, 8) * 4]
    done = []
    assert calibrate(gm, batches, lambda what, now, total: done.append((now, total))) == 2
    assert done == [(0, 2), (1, 2), (2, 2)]
    Pipeline.parse("fold").run(gm)
    data = torch.cat(batches)
    (scale,) = format("int8[tensor]").from_range(data.min().reshape(1, 1), data.max().reshape(1, 1))
    assert torch.equal(gm.q_input_scales, scale)
    assert "observer" not in str(snapshot(gm))


def test_an_output_is_observed_where_it_is_made() -> None:
    recipe = Recipe("out", (Rule("o", weight="int8", output="int8[tensor]", observer="average"),))
    gm = observed(recipe)
    calibrate(gm, [torch.ones(4, 8)])
    Pipeline.parse("fold").run(gm)
    assert str(snapshot(gm)).splitlines()[-5:] == [
        "o_output_quantized = bitfold.quantize.default(linear_2, 'int8[tensor]', [o_output_scales])",
        "o_output_codes: u8[4, 8] = getitem(o_output_quantized, 0)",
        "o_output_scales_1: f32[1, 1] = getitem(o_output_quantized, 1)",
        "o_output_dequantized: f32[4, 8] = bitfold.dequantize.default([o_output_codes, o_output_scales_1], "
        "'int8[tensor]', 8, f32)",
        "return (o_output_dequantized,)",
    ]


def test_minmax_and_average() -> None:
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.empty(0)]
    ranges = {}
    for kind in ("minmax", "average"):
        seen = observer(kind)
        for batch in batches:
            assert seen(batch) is batch
        assert seen.seen == 2
        ranges[kind] = tuple(map(float, seen.range()))
    assert ranges == {"minmax": (-3.0, 2.0), "average": (-2.0, 1.5)}


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=200), st.integers(1, 5))
def test_a_percentile_of_100_holds_every_number_to_one_bin(numbers: list[float], pieces: int) -> None:
    seen = observer("percentile:100")
    for piece in torch.tensor(numbers).tensor_split(pieces):
        seen(piece)
    low, high = map(float, seen.range())
    reach = max(map(abs, numbers))
    # The reach at most doubles past the largest number, and a bin is 1/1024 of it.
    slack = 2 * reach / 1024 + 1e-30
    assert low <= min(numbers) <= low + slack * 1.01
    assert high - slack * 1.01 <= max(numbers) <= high


def test_a_percentile_leaves_out_the_odd_ones() -> None:
    seen = observer("percentile:99")
    seen(torch.linspace(-1, 1, 10_000))
    seen(torch.tensor([500.0]))
    low, high = map(float, seen.range())
    # 500 doubled the reach from 1 to 512, so a bin is 0.5 wide.
    assert -1.5 <= low <= -0.5 and 0.5 <= high <= 1.5
    (first, last) = map(float, observer("percentile").range())
    assert (first, last) == (0.0, 0.0)


def test_a_percentile_is_the_quantile() -> None:
    seen, data = observer("percentile:98"), torch.randn(100_000)
    for piece in data.split(10_000):
        seen(piece)
    low, high = seen.range()
    bin_width = seen.reach / 1024
    assert abs(low - data.quantile(0.01)) <= bin_width
    assert abs(high - data.quantile(0.99)) <= bin_width


BAD_BATCHES = {
    "none": ([], "calibration has no batches; give at least one"),
    "shape": (
        [torch.zeros(4, 8), torch.zeros(4, 7)],
        "calibration batch 1: input 'x' has shape [4, 7], and the graph",
    ),
    "rank": ([torch.zeros(8)], "input 'x' has shape [8], and the graph was captured for [4, 8]"),
    "dtype": ([torch.zeros(4, 8).long()], "input 'x' is torch.int64, not torch.float32"),
    "nan": ([torch.full((4, 8), torch.nan)], "calibration batch 0 has NaN or infinity in argument 0"),
    "keywords": (
        [{"y": torch.zeros(4, 8)}],
        "calibration batch 0 has the keywords ['y'], and the graph was captured with []; give batches as",
    ),
    "count": (
        [(torch.zeros(4, 8), torch.zeros(1))],
        "calibration batch 0 has 2 inputs, and the graph takes 1",
    ),
    "batch": ([7], "calibration batch 0 is a int; give a tensor, a tuple of arguments or a dict"),
    "kind": ([("text",)], "input 'x' is 'text', not a tensor"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_data_is_found_before_anything_runs(case: str) -> None:
    batches, expected = BAD_BATCHES[case]
    gm = observed()
    with pytest.raises(BitfoldError) as caught:
        calibrate(gm, batches)
    assert expected in str(caught.value)
    assert gm.q_input_observer.seen == 0


def test_keywords_may_come_in_any_order() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x) + y

    gm = capture(Two(), {"x": torch.zeros(2, 8), "y": torch.zeros(8)})
    Pipeline.parse(f"annotate{{recipe={_quoted(STATIC)}}},observe").run(gm)
    assert calibrate(gm, [{"y": torch.ones(8), "x": torch.ones(2, 8) * 3}]) == 1
    assert float(gm.fc_input_observer.range()[1]) == 3.0


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ("fold", "layer q takes calibrated ranges and has no observer; run the pass observe and calibrate"),
        ("fake_quantize", "layer q takes calibrated ranges and has no observer"),
        (
            "observe,fold",
            "the observer at the input of layer q saw no data; run calibrate(gm, batches) first",
        ),
    ],
)
def test_a_calibrated_recipe_without_calibration_is_an_error(passes: str, expected: str) -> None:
    gm = capture(Shared(), (torch.randn(4, 8),))
    Pipeline.parse(f"annotate{{recipe={_quoted(STATIC)}}}").run(gm)
    with pytest.raises(BitfoldError) as caught:
        Pipeline.parse(passes).run(gm)
    assert expected in str(caught.value)
    assert "bitfold" not in str(snapshot(gm))


def test_calibrate_takes_an_observed_graph() -> None:
    with pytest.raises(BitfoldError, match="this one is captured; run observe first"):
        calibrate(capture(Shared(), (torch.randn(4, 8),)), [torch.zeros(4, 8)])


def test_a_path_that_starts_with_a_digit_makes_names_that_code_can_spell() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    gm = capture(model, (torch.randn(4, 8),))
    Pipeline.parse("annotate{recipe=int8_static},observe").run(gm)
    calibrate(gm, [torch.randn(4, 8)])
    Pipeline.parse("fold").run(gm)
    names = [str(node.target) for node in gm.graph.find_nodes(op="get_attr")]
    assert "_0_input_scales" in names
    assert all(name.isidentifier() for name in names if name != "0.bias")
    again = bf.quantize(model, "int8_static", calibration=[torch.randn(4, 8)], target="reference")
    assert again(torch.randn(2, 8)).shape == (2, 8)


class Reciprocal(nn.Module):
    """Makes infinity of zero, inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(1 / x)


@pytest.mark.parametrize("kind", ["minmax", "average", "moving", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("scope", ["module", "program"])
def test_infinity_that_comes_up_inside_the_model_is_no_range(scope: str, kind: str) -> None:
    model, wanted = Reciprocal(), Rule(weight="int8", input="int8[tensor]", observer=kind)
    batches = [torch.rand(4, 8) + 1, torch.rand(4, 8) + 1]
    batches[1][2, 3] = 0
    with pytest.raises(BitfoldError, match=r"batch 1: NaN or infinity comes to the input of layer inner.1,"):
        bf.quantize(model, Recipe("s", (wanted,)), scope=scope, calibration=batches, target="reference")
    assert type(model.inner[1]) is nn.Linear


def test_a_mask_of_attention_is_no_bad_data() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (self.fc(x) + mask).softmax(-1)

    x, mask = torch.randn(8, 8), torch.full((8, 8), -torch.inf).triu(1)
    for scope in ("module", "program"):
        q = bf.quantize(Added(), STATIC, scope=scope, calibration=[(x, mask)], target="reference")
        assert bool(q(x, mask).isfinite().all())
        for bad in (-mask, mask - 1, 0 * mask, torch.full_like(mask, -torch.inf)):
            with pytest.raises(BitfoldError, match=r"calibration batch 0.* NaN or infinity in "):
                bf.quantize(Added(), STATIC, scope=scope, calibration=[(x, bad)], target="reference")
