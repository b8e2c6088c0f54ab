"""`explain` on pipelines that are broken on purpose: the fault is the first or second line, and a sound one
has none.

four blocks, one fault -> inspect -> explain -> the lines that a person reads first
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.fx import GraphModule

from bitfold.lowering import Pipeline
from bitfold.lowering.lower import Lower
from bitfold.passes import Pass, calibrate
from bitfold.passes.annotate import Annotate
from bitfold.passes.fold import Fold
from bitfold.passes.fuse import Fuse
from bitfold.passes.observing.observe import Observe
from bitfold.passes.recipes import Recipe
from bitfold.passes.rules import Rule
from bitfold.tools.explain import Explanation, explain, numerics
from bitfold.tools.explain.finding import Finding, ranked
from bitfold.tools.explain.show import show
from bitfold.tools.inspection import inspect

X = (torch.randn(8, 64, generator=torch.Generator().manual_seed(1)),)
INT8 = Recipe("int8", (Rule(weight="int8"),))


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(64, 128), nn.Linear(128, 64), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    def __init__(self, odd: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(nn.ReLU()) for _ in range(4))
        if odd is not None:
            self.layers[2].act = odd

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class CastLeftIn(nn.Module):
    """A product that somebody once computed in float32 to look for an error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return nn.functional.linear(h.float(), self.b.weight.float(), self.b.bias.float()).to(x.dtype)


@dataclass(frozen=True)
class ShareScales(Pass):
    """The fault: the fourth block's first weight gets the scales of the first block's."""

    name: ClassVar[str] = "share_scales"

    def apply(self, gm: GraphModule) -> int:
        nodes = {str(node.target): node for node in gm.graph.find_nodes(op="get_attr")}
        wrong = nodes["layers_3_up_weight_scales"]
        wrong.replace_all_uses_with(nodes["layers_0_up_weight_scales"])
        gm.graph.erase_node(wrong)
        return 1


def pipeline(recipe: Recipe = INT8, *between: Pass, fuse: bool = True) -> Pipeline:
    rest = [Fuse(), Lower(target="cpu")] if fuse else []
    return Pipeline([Annotate(recipe=str(recipe)), *between, *rest])


def explained(model: nn.Module, steps: Pipeline, inputs=X, **given) -> Explanation:
    return explain(inspect(model.eval(), steps, inputs, runs=0, **given))


def first_lines(found: Explanation) -> list[str]:
    """What the terminal shows as 1 and 2."""
    out = io.StringIO()
    show(found, Console(file=out, width=200))
    return [line for line in out.getvalue().splitlines() if re.match(r" *[12]  ", line)]


def skipped() -> Explanation:
    recipe = INT8.but(Rule("layers.1.down", skip="it was sensitive in March"))
    return explained(Net(), pipeline(recipe, Fold()))


def one_scale_for_rows_that_differ() -> Explanation:
    model = Net()
    with torch.no_grad():
        model.layers[2].up.weight[5].mul_(300)
    return explained(model, pipeline(INT8.but(Rule("layers.2.up", weight="int8[tensor]")), Fold()))


def scales_of_another_weight() -> Explanation:
    model = Net()
    with torch.no_grad():
        model.layers[3].up.weight.mul_(3.0)
    return explained(model, pipeline(INT8, Fold(), ShareScales()))


def activation_saturated() -> Explanation:
    recipe = Recipe("static", (Rule(weight="int8", input="int8[tensor]", observer="minmax"),))
    small = [(0.3 * X[0],)]
    return explained(
        Net(), pipeline(recipe, Observe(), Fold()), calibrate=lambda gm: calibrate(gm, small) and None
    )


def fusion_missed() -> Explanation:
    return explained(Net(nn.Softshrink()), pipeline(INT8, Fold()))


def no_fusion_at_all() -> Explanation:
    return explained(Net(), pipeline(INT8, Fold(), fuse=False))


def cast_left_in() -> Explanation:
    model = CastLeftIn().to(torch.bfloat16)
    return explained(model, pipeline(INT8, Fold()), (X[0].to(torch.bfloat16),))


def lowered_for_a_gpu_that_is_not_there() -> Explanation:
    model = Net().to(torch.bfloat16)
    steps = Pipeline.parse("annotate{recipe=int8},fold,fuse,lower{target=cuda}")
    return explain(inspect(model.eval(), steps, (X[0].to(torch.bfloat16),), runs=1))


def rule_misspelled() -> Explanation:
    return explained(Net(), pipeline(INT8.but(Rule("layers.1.dwon", weight="int4[g32]")), Fold()))


BROKEN: list[tuple[Callable[[], Explanation], tuple[str, ...]]] = [
    (skipped, ("layers.1.down", "it was sensitive in March", "12 % of the weights")),
    (one_scale_for_rows_that_differ, ("layers.2.up", "one scale for the whole weight")),
    (scales_of_another_weight, ("layers.3.up", "the scales of layers.0.up")),
    (activation_saturated, ("layers", "beyond the scale of int8[tensor]")),
    (fusion_missed, ("layers.2.up", "softshrink stands behind its kernel")),
    (no_fusion_at_all, ("layers", "decoded into memory in each call")),
    (cast_left_in, ("cast to float32", "h.float()", "test_explain.py:")),
    (lowered_for_a_gpu_that_is_not_there, ("layers.", "no target runs it", "the target cuda runs on cuda")),
    (rule_misspelled, ("layers.1.dwon", "no layer matches this rule")),
]


@pytest.mark.parametrize(("fault", "told"), BROKEN, ids=[fault.__name__ for fault, _ in BROKEN])
def test_a_fault_is_in_the_first_two_lines(fault: Callable[[], Explanation], told: tuple[str, ...]) -> None:
    lines = first_lines(fault())
    assert any(all(word in line for word in told) for line in lines), lines


def test_a_sound_pipeline_has_nothing_to_tell() -> None:
    found = explained(Net(), pipeline(INT8, Fold()))
    assert found.findings == ()
    out = io.StringIO()
    show(found, Console(file=out, width=200))
    assert "Everything that was asked for was done" in out.getvalue()


def test_the_tree_has_formats_bits_errors_and_joins_what_is_alike() -> None:
    found = explained(Net(), pipeline(INT8.but(Rule("layers.2.*", weight="int4[g32]")), Fold()))
    rows = {row.path: row for row in found.rows}
    assert set(rows) == {
        "layers.{0..1,3}.up", "layers.{0..1,3}.down", "layers.2.up", "layers.2.down"
    }  # fmt: skip
    wide, narrow = rows["layers.{0..1,3}.up"], rows["layers.2.up"]
    assert (wide.format, wide.count, wide.target, wide.kernel) == ("int8", 3, "cpu", "C++")
    assert wide.bits == 8 + 32 / 64 and narrow.bits == 4 + 16 / 32
    assert wide.own_db is not None and narrow.own_db is not None and wide.own_db > narrow.own_db + 15
    assert wide.nbytes == 3 * 128 * 64 * 17 / 16


def test_times_are_shared_out_to_modules() -> None:
    found = explain(inspect(Net().eval(), pipeline(INT8, Fold()), X, runs=2))
    assert found.seconds > 0
    assert sum(row.seconds for row in found.rows) == pytest.approx(found.seconds, rel=1e-6)
    assert {row.path for row in found.rows if row.seconds} >= {"layers.{0..3}.up", "layers.{0..3}.down"}


def test_own_errors_are_those_that_diagnose_measures() -> None:
    """A graph's nodes here, a model's layers there: on the reference target the same values in the same order
    go into one measure, so the numbers are equal to the last bits."""
    import bitfold as bf

    model = Net().eval()
    quantized = bf.quantize(copy.deepcopy(model), "int4[g32]", target="reference")
    layers = bf.diagnose(model, quantized, [X]).layers
    steps = 'annotate{recipe="int4[g32]"},fold'
    found = inspect(model, steps, X, runs=0)
    own = {module: isolated for _, module, _, isolated in numerics.layers(found)}
    so_far = {
        node.module_path: found.errors[node.name].sqnr_db
        for node in found.trace.steps[1].snapshot
        if node.note
    }
    assert len(layers) == 8 and len({layer.isolated for layer in layers}) == 8
    for layer in layers:
        assert own[layer.path] == pytest.approx(layer.isolated, abs=1e-9)
        assert so_far[layer.path] == pytest.approx(layer.cumulative, abs=1e-9)


def test_alike_findings_are_one_line_and_a_cause_stands_for_its_symptom() -> None:
    given = [
        Finding(20, "skipped", "a", "…", "r"),
        Finding(30, "skipped", "b", "…", "r"),
        Finding(90, "own error", "c", "errs", "s"),
        Finding(60, "saturated", "c", "cut off", "t"),
    ]
    first, second = ranked(given)
    assert (first.where, first.kind) == ("c", "saturated")
    assert str(second) == "b and 1 more: …" and second.weight == 50


def test_from_python_it_prints_as_the_command_does() -> None:
    import bitfold as bf

    found = bf.inspect(Net().eval(), "annotate{recipe=int8},fold,fuse,lower{target=cpu}", X, runs=0)
    told = str(bf.explain(found)).splitlines()
    assert told[0].startswith("Everything that was asked for was done")
    assert any("layers.{0..3}" in line for line in told) and told[-1].startswith("weights 0.3 -> 0.1 MiB")


def test_hostile_names_are_text_on_the_terminal_too() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("[red]x[/red]", nn.Linear(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return self._modules["[red]x[/red]"](x)

    recipe = INT8.but(Rule("*", skip="[bold]no[/bold]"))
    found = explained(Odd(), pipeline(recipe, Fold()))
    out = io.StringIO()
    show(found, Console(file=out, width=200))
    assert "[bold]no[/bold]" in out.getvalue() and "[red]x" in out.getvalue()


def test_what_nobody_spoke_of_is_told_where_it_is_large_and_a_shared_weight_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(512, 64), nn.Linear(64, 512, bias=False)
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.down(torch.relu(self.up(self.embed(tokens)))))

    found = explained(Tied(), pipeline(INT8, Fold()), (torch.arange(8)[None],))
    (only,) = found.findings
    assert only.where == "embed" and "(one weight with head)" in only.what
    held = 4 * 512 * 64 + 2 * 128 * 64 + 4 * (128 + 64) * 2  # the table, codes, scales and biases
    assert f"0.1 MiB, {100 * 4 * 512 * 64 / held:.0f} % of what the model holds now" in only.what
    assert "match='*embed'" in only.remedy and "match='*head'" in only.remedy
    everything = explained(Tied(), pipeline(Recipe.parse("int8_all"), Fold()), (torch.arange(8)[None],))
    assert everything.findings == ()
