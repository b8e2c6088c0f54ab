"""`bf.search`: the integer program against every combination, and recipes against uniform ones of their
size."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from search_cases import unequal
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.outputs import divergence
from bitfold.lowering.search.integer_program import fewest_bits, fewest_losses, pareto
from bitfold.lowering.search.search import Budget
from bitfold.lowering.search.sensitivity import Choice, Sensitivity, sensitivity
from bitfold.lowering.search.smallest import rounded_loss
from bitfold.passes.recipes import Recipe

pytest.importorskip("scipy", reason="bf.search solves its program with scipy")

FORMATS = ("int8[g32]", "int4[g32]", "int3[g32]", "int2[g32]")


@pytest.fixture
def model() -> nn.Module:
    return unequal()


@pytest.fixture
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(32, 64) for _ in range(4)]


def table(layers: int = 4, seed: int = 0) -> Sensitivity:
    torch.manual_seed(seed)
    numel = {f"layer{i}": 1000 * (i + 1) for i in range(layers)}
    choices = [
        Choice(layer, text, bits * count, float(torch.rand(())) * 2.0**-bits)
        for layer, count in numel.items()
        for text, bits in (("int8", 8.0), ("int4", 4.0), ("int3[row]", 3.0))
    ]
    return Sensitivity(tuple(choices), numel)


def every(given: Sensitivity) -> list[tuple[Choice, ...]]:
    return list(itertools.product(*(given.of(layer) for layer in given.numel)))


@pytest.mark.parametrize("seed", range(4))
def test_the_program_is_solved_to_the_optimum(seed: int) -> None:
    """Against all 81 combinations."""
    given = table(seed=seed)
    total = sum(given.numel.values())
    for bits in (3.0, 3.7, 4.2, 5.5, 8.0):
        inside = [one for one in every(given) if sum(c.bits for c in one) <= bits * total + 1e-6]
        best = min(sum(c.loss for c in one) for one in inside)
        chosen = fewest_losses(given, bits)
        assert sum(c.loss for c in chosen) == pytest.approx(best)
        assert sum(c.bits for c in chosen) <= bits * total * (1 + 1e-6)
        good = [one for one in every(given) if sum(c.loss for c in one) <= best + 1e-12]
        smallest = min(sum(c.bits for c in one) for one in good)
        assert sum(c.bits for c in fewest_bits(given, best + 1e-9)) == pytest.approx(smallest)


def test_losses_beyond_what_the_solver_takes_for_a_number() -> None:
    """A layer that overflows in a coarse format has losses of any size."""
    given = table()
    huge = {("layer1", "int3[row]"): 1e28, ("layer2", "int4"): 1e24}
    choices = (replace(one, loss=huge.get((one.layer, one.format), one.loss)) for one in given.choices)
    given = replace(given, choices=tuple(choices))
    chosen = fewest_bits(given, 0.2)
    taken = [(one.layer, one.format) for one in chosen]
    inside = [one for one in every(given) if sum(c.loss for c in one) <= 0.2]
    assert sum(c.bits for c in chosen) == min(sum(c.bits for c in one) for one in inside)
    assert not set(taken) & set(huge)
    with pytest.raises(bf.BitfoldError, match="lose inf%, more than"):
        fewest_bits(scaled(given, 1e9), 0.2)


def test_a_budget_that_nothing_keeps_names_the_nearest() -> None:
    with pytest.raises(bf.BitfoldError, match=r"take 3\.000 bits a weight, more than 2\.5"):
        fewest_losses(table(), 2.5)
    with pytest.raises(bf.BitfoldError, match="finest formats for each layer lose"):
        fewest_bits(table(), 1e-9)


def test_the_front_falls() -> None:
    points = pareto(table(), 9)
    assert points[0][0] == pytest.approx(3.0) and points[-1][0] <= 8.0
    assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in itertools.pairwise(points))


def test_losses_are_of_one_layer_alone(model: nn.Module, data: list[Tensor]) -> None:
    before = copy.deepcopy(model.state_dict())
    found = sensitivity(model, data, FORMATS)
    assert set(found.numel) == {"first", "second", "last"}
    twin = copy.deepcopy(model)
    twin.second.weight.data = bf.format("int3[g32]").fake_quantize(twin.second.weight.data)
    expected = sum(float(divergence(model(x), twin(x))) for x in data) / len(data)
    assert found.loss("second", "int3[g32]") == pytest.approx(expected, rel=1e-4)
    assert found.loss("second", "int2[g32]") < 0.01 * found.loss("last", "int2[g32]")
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_recipe_beats_the_uniform_one_of_its_size(model: nn.Module, data: list[Tensor]) -> None:
    recipe = bf.search(model, data, budget="4.5 bits", formats=FORMATS)
    assert recipe.name == "search 4.5 bits" and "bits a weight" in recipe.about

    def loss(wanted: str | Recipe) -> float:
        q = copy.deepcopy(model)
        bf.quantize(q, wanted, target="reference")
        return sum(float(divergence(model(x), q(x))) for x in data)

    assert loss(recipe) < 0.5 * loss("int4[g32]")  # which takes 4.5 bits too


def test_a_perplexity_is_kept_by_the_whole_recipe(model: nn.Module, data: list[Tensor]) -> None:
    recipe = bf.search(model, data, budget="1% perplexity", formats=FORMATS)
    q = copy.deepcopy(model)
    bf.quantize(q, recipe, target="reference")
    assert sum(float(divergence(model(x), q(x))) for x in data) / len(data) <= math.log(1.01) * (1 + 1e-6)
    assert "int8" not in {rule.weight for rule in recipe.rules if rule.match == "second"}


def test_recipes_are_saved_and_read(model: nn.Module, data: list[Tensor], tmp_path: Path) -> None:
    recipe = bf.search(model, data, budget="4 bits", formats=FORMATS)
    path = tmp_path / "found.json"
    path.write_text(json.dumps(recipe.to_dict()))
    assert Recipe.parse(str(path)) == recipe == Recipe.parse(str(recipe))


def test_budgets_parse() -> None:
    assert Budget.parse("4.2 bits") == Budget("bits", 4.2)
    assert Budget.parse("0.5% perplexity") == Budget("perplexity", 0.005)
    for text in ("4.2", "bits", "-1 bits", "0 bits", "40 s", "0.5 perplexity", 4):
        with pytest.raises(bf.BitfoldError, match="a budget is text such as"):
            Budget.parse(text)  # type: ignore[arg-type]


def spoilt(model: nn.Module) -> nn.Module:
    model.first.weight.data[0, 0] = math.nan  # type: ignore[union-attr, operator, index]
    return model


NONSENSE: dict[str, tuple[dict[str, Any], str]] = {
    "no formats": ({"formats": ()}, r"formats is a list of formats such as .* not \(\)"),
    "one format": ({"formats": "int4"}, "formats is a list of formats such as .* not 'int4'"),
    "no data": ({"data": None}, "no batches to measure"),
    "a batch for data": ({"data": torch.randn(4, 64)}, "calibration is a Tensor; give a list"),
    "another table": ({"table": table()}, "the table is of another model: it has a layer 'layer0' of 1000"),
    "an empty table": ({"table": Sensitivity((), {})}, "the table has no layers"),
    "no table": ({"table": {}}, "table is a Sensitivity, not a dict"),
    "no times": ({"times": {}, "budget": "4 ms"}, "times is a Times, not a dict"),
    "no loss": ({"loss": "kl"}, "loss is a function of .* not 'kl'"),
    "no number": ({"loss": lambda exact, found: found - exact}, r"returns one number, not \[32, 32\]"),
    "no weights": ({"model": unequal().to("meta")}, "on the meta device"),
    "a weight with NaN": ({"model": spoilt(unequal())}, r"has NaN in it; so has first\.weight"),
    "one output": (
        {"model": nn.Sequential(unequal(), nn.Linear(32, 1))},
        r"an output of shape \[32, 1\] holds no predictions",
    ),
}


@pytest.mark.parametrize("by", ["measured", "trace"])
@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_said(case: str, by: str, data: list[Tensor]) -> None:
    more, said = NONSENSE[case]
    if by == "trace" and "loss" in more:
        return
    given = {"model": unequal(), "data": data, "budget": "4.5 bits", "formats": FORMATS, "by": by} | more
    with pytest.raises(
        bf.BitfoldError, match=said if "batches" not in said or by == "measured" else "one batch"
    ):
        bf.search(given.pop("model"), given.pop("data"), **given)


def test_an_output_of_one_dimension_is_one_row(model: nn.Module, data: list[Tensor]) -> None:
    one = sensitivity(model, [data[0][:1]], FORMATS)
    flat = sensitivity(model, [data[0][0]], FORMATS)
    for a, b in zip(one.choices, flat.choices, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3)


def test_no_data_is_said(model: nn.Module) -> None:
    with pytest.raises(bf.BitfoldError, match="no batches to measure"):
        bf.search(model, [], budget="4 bits")
    with pytest.raises(bf.BitfoldError, match="does not go through"):
        bf.search(model, [torch.randn(2, 3)], budget="4 bits")


class Masked(nn.Module):
    """Five outputs are masked, as the padding of a vocabulary is."""

    def __init__(self, model: nn.Module, value: float) -> None:
        super().__init__()
        self.model, self.value = model, value

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x).clone()
        out[..., :5] = self.value
        return out


def test_masked_outputs_are_no_difference(model: nn.Module, data: list[Tensor]) -> None:
    """-inf in both predictions: the same choice as where the mask is a number too small to count."""
    infinite = bf.search(Masked(model, -math.inf), data, budget="4.5 bits")
    assert infinite == bf.search(Masked(model, -1e4), data, budget="4.5 bits")


def test_outputs_that_are_no_numbers_are_said(model: nn.Module, data: list[Tensor]) -> None:
    with pytest.raises(bf.BitfoldError, match="batch 0 has NaN"):
        bf.search(Masked(model, math.nan), data, budget="4.5 bits")
    with pytest.raises(bf.BitfoldError, match="is not finite"):
        bf.search(model, data, budget="4.5 bits", loss=lambda exact, found: torch.tensor(math.nan))


def test_scipy_is_looked_for_before_anything_is_measured(
    model: nn.Module, data: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    done: list[str] = []
    with pytest.raises(bf.BitfoldError, match=r"bf\.search wants scipy"):
        bf.search(model, data, budget="4.5 bits", progress=lambda what, now, total: done.append(what))
    assert not done


def scaled(given: Sensitivity, factor: float) -> Sensitivity:
    return replace(given, choices=tuple(replace(one, loss=one.loss * factor) for one in given.choices))


def test_the_finest_recipe_is_run_before_a_perplexity_is_refused(
    model: nn.Module, data: list[Tensor]
) -> None:
    """Losses by layer are estimates: whether the finest recipe keeps a budget is measured."""
    found = sensitivity(model, data, ("int4[g32]", "int3[g32]"))
    with pytest.raises(bf.BitfoldError, match=r"together, more than 0\.01%"):
        bf.search(model, data, budget="0.01% perplexity", table=scaled(found, 0.02))


def test_a_search_that_ends_at_the_finest_formats_says_so(data: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    found = sensitivity(model, data, ("int8[g32]", "int2[g32]"))
    lost = math.expm1(rounded_loss(model, Recipe.parse("int8[g32]"), data, divergence))
    for factor in (0.02, 1, 50):
        recipe = bf.search(model, data, budget=f"{101 * lost:.8f}% perplexity", table=scaled(found, factor))
        assert {rule.weight for rule in recipe.rules} == {"int8[g32]"}
        assert re.search(r"the finest format of each layer: \d+ smaller recipes? lost more", recipe.about)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_estimates_that_are_off_by_any_factor_find_the_same_recipe(
    model: nn.Module, data: list[Tensor], factor: float
) -> None:
    """Tightened where the losses add up to too little, loosened where they add up to too much."""
    found = sensitivity(model, data, FORMATS[1:])
    most = math.log(1.01)
    exact, off = (
        bf.search(model, data, budget="1% perplexity", table=one) for one in (found, scaled(found, factor))
    )
    lost = [rounded_loss(model, recipe, data, divergence) for recipe in (exact, off)]
    assert max(lost) <= most < rounded_loss(model, Recipe.parse("int3[g32]"), data, divergence)
    assert off.rules == exact.rules
    assert f"{100 * math.expm1(lost[1]):.3g}% of perplexity, run as a whole" in off.about


def test_no_recipe_that_holds_is_much_smaller(model: nn.Module, data: list[Tensor]) -> None:
    """Among all eight, each run as a whole."""
    found = sensitivity(model, data[:1], FORMATS[1:3])
    recipe = bf.search(model, data[:1], budget="1% perplexity", table=found)
    sizes = [
        sum(one.bits for one in chosen) / sum(found.numel.values())
        for chosen in every(found)
        if rounded_loss(model, found.recipe(chosen, "one"), data[:1], divergence) <= math.log(1.01)
    ]
    assert min(sizes) < 4 and float(recipe.about.split(" bits")[0]) <= min(sizes) + 0.1


class Watched(nn.Module):
    """Counts its outputs that are still held."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.held, self.most = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x).clone()
        self.held += 1
        self.most = max(self.most, self.held)
        weakref.finalize(out, self._freed)
        return out

    def _freed(self) -> None:
        self.held -= 1


def test_a_recipe_is_run_batch_by_batch(model: nn.Module, data: list[Tensor]) -> None:
    """Of a language model's outputs, which are its largest tensors, two are held at a time."""
    watched = Watched(model)
    lost = rounded_loss(watched, Recipe.parse("int4[g32]"), data * 2, divergence)
    assert lost == pytest.approx(rounded_loss(model, Recipe.parse("int4[g32]"), data, divergence))
    assert watched.most == 2 and watched.held == 0


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"budget": "5 bits", "by": "guess"}, "by is 'measured' or 'trace'"),
        ({"budget": "5% perplexity"}, "give batches"),
    ],
)
def test_a_table_does_not_hide_mistakes(asked: dict[str, str], sentence: str) -> None:
    model, data = nn.Sequential(nn.Linear(32, 32)), [torch.randn(4, 32)]
    table = sensitivity(model, data, ("int8",))
    with pytest.raises(bf.BitfoldError, match=sentence):
        bf.search(model, [], table=table, **asked)  # type: ignore[arg-type]
