"""What an inspection says of a pipeline: work, kernels, weights, activations; and that the last step computes
what the lowered graph computes.

a small net -> annotate, fold, fuse, lower -> inspect -> figures that are known by hand
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bitfold.codegen.device import device
from bitfold.formats import format
from bitfold.lowering import Pipeline
from bitfold.tools.chrome import export
from bitfold.tools.inspection import Inspection, inspect
from bitfold.tools.pareto import Point, fronted, points
from bitfold.tools.roof import Roof, of_card, roof_of
from bitfold.tools.viz.activations import quantized
from bitfold.tools.viz.histogram import histogram, outliers
from bitfold.tools.viz.kernels import kernel_of
from bitfold.tools.viz.overlay import all_errors, kernels_of, overlay_data
from bitfold.tools.work import measure

X = (torch.randn(4, 64, generator=torch.Generator().manual_seed(1)),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def inspected(recipe: str = "int8", target: str = "cpu", runs: int = 0, dtype=torch.float32) -> Inspection:
    steps = Pipeline.parse(f'annotate{{recipe="{recipe}"}},fold,fuse,lower{{target={target}}}')
    return inspect(Net().eval().to(dtype), steps, tuple(x.to(dtype) for x in X), runs=runs)


@pytest.fixture(scope="module")
def found() -> Inspection:
    return inspected(runs=2)


def test_the_last_step_computes_what_the_lowered_graph_does(found) -> None:
    (given,) = (found.final(*X),)
    lowered = found.gm(*X)
    # The same sums in another order: both in float32, of 128 products at most, so 128 * 2**-24 of the
    # largest.
    torch.testing.assert_close(given[0], lowered, rtol=1e-5, atol=128 * 2**-24 * float(lowered.abs().max()))
    assert found.trace.steps[-1].name == "finish" and len(found.trace.steps) == 6


def test_the_model_is_left_as_it_was() -> None:
    model = Net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inspect(model, Pipeline.parse("annotate{recipe=int8},fold,fuse,lower{target=cpu}"), X, runs=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Counter(nn.Module):
    """Its result depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.register_buffer("calls", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return self.fc(x) + self.calls


def test_a_model_that_counts_its_calls_counts_none_of_ours(tmp_path) -> None:
    model = Counter().eval()
    found = inspect(model, Pipeline.parse("annotate{recipe=int8},fold,fuse,lower{target=cpu}"), X[0], runs=2)
    assert model.calls.eq(0).all()
    own, result = found.errors["fused_fc"], list(found.errors.values())[-1]
    assert own.sqnr_db > 30 and result.sqnr_db > 30, "the second run does not see what the first one wrote"
    export(found, X, tmp_path / "trace.json")
    assert model.calls.eq(0).all()


def test_operations_and_bytes_are_those_of_the_definition(found) -> None:
    kernels = {k.spec: found.work[name] for name, k in found.kernels.items()}
    pair = kernels["linear 128x64 f32 2*int8 -> mul(silu(y0),y1)"]
    assert pair.flops == 2 * 4 * 128 * 64 * 2
    codes, scales, x, y = 2 * 128 * 64, 2 * 128 * 4, 4 * 64 * 4, 4 * 128 * 4
    assert pair.bytes == codes + scales + x + y
    assert pair.seconds is not None and 0 < pair.seconds < 1
    # Torch's own count of the captured graph.
    assert found.baseline["linear"].flops == 2 * 4 * 128 * 64
    assert found.baseline["linear"].bytes == 4 * (4 * 64 + 128 * 64 + 4 * 128)
    assert found.baseline["linear"].seconds is None


def test_the_profiler_writes_nothing_to_the_terminal(capfd) -> None:
    from bitfold.passes.scopes.program import capture

    assert measure(capture(Net().eval(), X), X, runs=1)["linear"].seconds is not None
    assert capfd.readouterr() == ("", "")


def test_a_view_moves_nothing_and_a_write_in_place_does() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 128).transpose(0, 1).relu()

    from bitfold.passes.scopes.program import capture

    work = measure(capture(Views(), X), X, runs=0)
    assert work["reshape"].bytes == work["transpose"].bytes == 0
    assert work["relu"].bytes == 2 * 4 * 64 * 4


def test_kernels_have_their_source_and_go_by_region_too(found) -> None:
    assert all(
        kernel.language == "C++" and "bitfold" in kernel.source and kernel.facts["vectors"]
        for kernel in found.kernels.values()
    )
    names = kernels_of(found)
    assert names["fused_gate"] == names["fused_up"], "one kernel took in both"
    (kernel,) = names["fused_down"]
    assert found.kernels[kernel].spec == "linear 64x128 f32 int8 -> add(e0,y0)"


def test_a_gpus_kernels_are_shown_without_one() -> None:
    found = inspected("int4[g32]", "cuda_on_paper", dtype=torch.bfloat16)
    assert found.on_paper and found.roof == of_card(device("NVIDIA H200"))
    pair = next(found.work[n] for n, k in found.kernels.items() if "2*int4" in k.spec)
    codes, scales, x, y = 2 * 128 * 32, 2 * 128 * 2 * 2, 4 * 64 * 2, 4 * 128 * 2
    assert (pair.flops, pair.bytes) == (2 * 4 * 128 * 64 * 2, codes + scales + x + y)
    assert all(done.seconds is None for done in found.work.values()), "nothing ran"
    assert all("roof_us" in told for told in overlay_data(found)["kernels"].values())
    for kernel in found.kernels.values():
        assert kernel.language == "Triton" and "tl.dot" in kernel.source
        assert kernel.schedule.startswith("m8 n64")
        assert 16 < int(kernel.facts["registers of a thread"]) <= 255
        assert kernel.facts["spilled bytes of a thread"] == 0
    assert found.errors["fused_down"].isolated_db > 15, "compared before it was lowered for another device"


def test_where_products_come_first_on_a_gpu_their_kernel_is_shown() -> None:
    """At 64 rows an H200 runs a gate and an up projection as two pipelined products, and what stands behind
    them in a kernel of its own (`lowering/fused.py`); at 1 row one kernel does all."""
    text = "linear 14336x4096 bf16 2*int4[g128,halves256] -> mul(silu(y0),y1)"
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.bitfold.fused.default, ([graph.placeholder("x")], text))
    one, many = (kernel_of(node, read=(rows, 4096), gpu=90, compiled=False) for rows in (1, 64))
    assert one is not None and many is not None
    assert (one.language, one.note) == ("Triton", "") and "silu" in one.source
    assert many.language == "Triton, pipelined" and many.note.startswith("2 times, then")
    assert many.spec == text and "silu" not in many.source and many.facts["rows"] == 64


def test_a_residual_does_not_hide_a_regions_own_error(found) -> None:
    region, product = found.errors["fused_down"], found.errors["linear_2"]
    assert product.isolated_db < region.isolated_db
    told = all_errors(found)
    assert told["fused_down"].isolated_db == product.isolated_db
    assert told[kernels_of(found)["fused_down"][0]].isolated_db == product.isolated_db


def test_weights_are_told_by_their_codes_scales_and_rows() -> None:
    model = Net().eval()
    with torch.no_grad():
        model.up.weight[7].mul_(50)
    steps = Pipeline.parse('annotate{recipe="int8[tensor]"},fold,fuse,lower{target=cpu}')
    stats = inspect(model, steps, X, runs=0).weights["up_weight_codes"]
    assert stats.layer == "up" and stats.shape == (128, 64)
    assert sum(count for _, count in stats.codes) == 128 * 64 and len(stats.codes) == 256
    assert sum(stats.values.counts) == 128 * 64
    assert stats.rows[0][0] == 7 and 40 < stats.rows[0][1] < 60
    int8 = format("int8")
    exact = model.up.weight.detach()
    rounded = int8.dequantize(int8.quantize(exact))
    by_hand = 10 * math.log10(exact.square().sum() / (rounded - exact).square().sum())
    assert stats.row_sqnr_db == pytest.approx(by_hand, abs=1e-3)
    assert stats.sqnr_db < by_hand
    assert inspected().weights["up_weight_codes"].shares_scales == ""


def test_what_is_cut_off_is_counted_and_what_is_rounded_is_not() -> None:
    fmt = format("int8[tensor]")
    x = torch.linspace(-1.0, 1.0, 1001).reshape(1, -1)
    scale = torch.tensor([[0.5 / 127]])  # reaches from -0.5 to 0.5
    narrow = quantized(x, "int8[tensor]", fmt.quantize(x, [scale]).parts)
    beyond = float((x.abs() > 0.5 + 0.55 * 0.5 / 127).float().mean())
    assert narrow.clipped == pytest.approx(beyond, abs=0.003)
    wide = quantized(x, "int8[tensor]", fmt.quantize(x).parts)
    assert wide.clipped == 0.0
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for text in ("int8", "int4[g32]", "float8_e4m3fn", "mxfp4", "uint4[g32,zero]", "nf4[g64]"):
        given = format(text)
        # mxfp4's power-of-two scale lies below the largest value on purpose; the others reach it.
        most = 0.02 if text == "mxfp4" else 0.0
        assert (quantized(values, text, given.quantize(values).parts).clipped or 0.0) <= most, text


def test_histograms_count_every_number() -> None:
    made = histogram(torch.tensor([0.0, 1.0, 2.0, math.inf, math.nan]))
    assert (made.low, made.high, sum(made.counts), made.other) == (0.0, 2.0, 3, 2)
    assert histogram(torch.full((5,), 3.0)).counts == (5,)
    assert histogram(torch.empty(0)).counts == ()
    assert outliers(torch.tensor([1.0, 1.0, 1.0, 9.0])) == ((3, 9.0),)
    assert outliers(torch.ones(8)) == () and outliers(torch.zeros(8)) == ()


def test_a_roof_is_memory_below_its_ridge_and_products_above() -> None:
    roof = Roof("x", read=10.0, flops=100.0)
    assert roof.ridge == 10.0
    assert (roof.seconds(100, 100), roof.bound(100, 100)) == (10.0, "memory")
    assert (roof.seconds(2000, 10), roof.bound(2000, 10)) == (20.0, "compute")
    measured = roof_of(torch.device("cpu"))
    assert measured is roof_of(torch.device("cpu")) and measured.read > 1e8 and measured.flops > 1e8


def test_recipes_that_no_other_beats_are_on_the_front() -> None:
    given = [Point("a", 8, 40), Point("b", 4, 20), Point("c", 5, 19), Point("d", 8, 39)]
    assert [(one.recipe, one.front) for one in fronted(given)] == [
        ("b", True), ("c", False), ("a", True), ("d", False)
    ]  # fmt: skip


def test_bits_of_a_recipe_count_all_that_is_held() -> None:
    (four, eight) = points({"int8": inspected("int8"), "int4[g32]": inspected("int4[g32]")})
    assert (four.recipe, four.bits) == ("int4[g32]", 4 + 16 / 32)
    rows, numbers = 128 + 128 + 64, 3 * 128 * 64
    assert eight.bits == pytest.approx(8 + 32 * rows / numbers)
    assert four.front and eight.front and eight.sqnr_db > four.sqnr_db + 15


def test_the_pages_data_is_finite_and_refers_to_nodes_that_are_there(found) -> None:
    import json

    data = overlay_data(found)
    json.dumps(data, allow_nan=False)
    names = {node.name for step in found.trace.steps for node in step.snapshot}
    for key in ("work", "kernels", "kernels_of", "targets"):
        assert set(data[key]) <= names, key
    assert data["targets"]["fused_down"] == "cpu"
    assert data["targets"][data["kernels_of"]["fused_down"][0]] == "cpu, C++"
    assert set(data["weights"]) == {"gate_weight_codes", "up_weight_codes", "down_weight_codes"}
