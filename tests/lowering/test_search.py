"""`bf.search`: the integer program against every combination, and recipes against uniform ones of their
size."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from search_cases import unequal
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.search.search import Budget, fewest_bits, fewest_losses, pareto
from bitfold.lowering.search.sensitivity import Choice, Sensitivity, divergence, sensitivity
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


def test_a_budget_that_nothing_keeps_names_the_nearest() -> None:
    with pytest.raises(bf.BitfoldError, match=r"take 3\.000 bits a weight, more than 2\.5"):
        fewest_losses(table(), 2.5)
    with pytest.raises(bf.BitfoldError, match="finest formats for each layer lose"):
        fewest_bits(table(), 1e-9)


def test_the_front_falls(model: nn.Module, data: list[Tensor]) -> None:
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


def test_the_finest_recipe_is_run_before_a_perplexity_is_refused(
    model: nn.Module, data: list[Tensor]
) -> None:
    """Losses by layer are estimates: whether the finest recipe keeps a budget is measured."""
    formats = ("int4[g32]", "int3[g32]")
    found = sensitivity(model, data, formats)
    low, high = (
        replace(found, choices=tuple(replace(one, loss=one.loss * factor) for one in found.choices))
        for factor in (0.02, 50)
    )
    with pytest.raises(bf.BitfoldError, match=r"together, more than 0\.01%") as caught:
        bf.search(model, data, budget="0.01% perplexity", table=low)
    lost = float(str(caught.value).split("lose ")[1].split("%")[0])
    recipe = bf.search(model, data, budget=f"{1.01 * lost:.6f}% perplexity", table=high)
    assert {rule.weight for rule in recipe.rules} == {"int4[g32]"}
