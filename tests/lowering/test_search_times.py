"""`bf.search` within a time: the optimum, tables of times, and traces as sensitivity."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from search_cases import unequal
from torch import Tensor, nn

import bitfold as bf
from bitfold.codegen.device import device
from bitfold.lowering.search.integer_program import fewest_losses_in_time
from bitfold.lowering.search.search import Budget
from bitfold.lowering.search.sensitivity import Choice, Sensitivity, sensitivity
from bitfold.lowering.search.times import Times, measure_times, model_times
from bitfold.lowering.search.trace import trace_sensitivity

pytest.importorskip("scipy", reason="bf.search solves its program with scipy")

FORMATS = ("int8[g32]", "int4[g32]", "int2[g32]")


def data() -> list[Tensor]:
    return list(torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(1)))


def given() -> tuple[Sensitivity, Times]:
    draw = torch.Generator().manual_seed(3)
    choices = [
        Choice(f"l{i}", text, bits * 100, float(torch.rand((), generator=draw)) * 2.0**-bits)
        for i in range(4)
        for text, bits in (("int8", 8.0), ("int4", 4.0), ("int3[row]", 3.0))
    ]
    seconds = {
        (one.layer, str(bf.format(one.format))): 1e-6 * one.bits * (1 + float(torch.rand((), generator=draw)))
        for one in choices
    }
    named = [Choice(one.layer, str(bf.format(one.format)), one.bits, one.loss) for one in choices]
    return Sensitivity(tuple(named), {f"l{i}": 100 for i in range(4)}), Times(seconds, 1e-3, "made up")


def test_the_program_is_solved_to_the_optimum() -> None:
    """Against all 81 combinations, the rest of the model counted."""
    table, times = given()
    every = list(itertools.product(*(table.of(layer) for layer in table.numel)))
    spans = sorted(times.total(one) for one in every)
    for budget in (spans[0], spans[20], spans[60], spans[-1]):
        budget *= 1 + 1e-9
        best = min(sum(c.loss for c in one) for one in every if times.total(one) <= budget)
        chosen = fewest_losses_in_time(table, times, budget)
        assert times.total(chosen) <= budget * (1 + 1e-6)
        assert sum(c.loss for c in chosen) == pytest.approx(best)
    with pytest.raises(bf.BitfoldError, match="the fastest formats for each layer take"):
        fewest_losses_in_time(table, times, spans[0] * 0.99)


def test_budgets_of_time() -> None:
    assert Budget.parse("40 ms") == Budget("seconds", 0.04)
    assert Budget.parse("2.5us").amount == pytest.approx(2.5e-6)
    with pytest.raises(bf.BitfoldError, match="'40 ms'"):
        Budget.parse("40 s")


def test_a_time_that_no_recipe_keeps_is_said_before_losses_are_measured() -> None:
    done: list[str] = []
    with pytest.raises(bf.BitfoldError, match=r"the fastest formats for each layer take .* ms"):
        bf.search(
            unequal(),
            data(),
            budget="0.0001 us",
            formats=FORMATS,
            progress=lambda what, *_: done.append(what),
        )
    assert not done


def test_a_recipe_for_a_time_says_its_time_and_is_saved(tmp_path: Path) -> None:
    table = sensitivity(unequal(), data(), FORMATS)
    seconds = {
        (one.layer, one.format): {"int8": 3e-3, "int4": 2e-3, "int2": 1e-3}[one.format.split("[")[0]]
        for one in table.choices
    }
    times = Times(seconds, 1e-3, "a table")
    recipe = bf.search(unequal(), data(), budget="7 ms", table=table, times=times)
    # 6 ms are left for three layers: the one that matters most has the finest, the least one the coarsest.
    assert "7 ms (a table)" in recipe.about
    quantized = bf.quantize(unequal(), recipe, target="reference")
    texts = {
        path: getattr(quantized, path).folded_weights[0].canonical for path in ("first", "second", "last")
    }
    assert sum(seconds[path, text] for path, text in texts.items()) <= 6e-3 + 1e-9
    assert texts["second"] == "int2[g32]"
    kept = tmp_path / "recipe.json"
    kept.write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
    assert bf.Recipe.parse(str(kept)) == recipe


def test_times_are_measured_where_the_model_runs() -> None:
    wide = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 64)).eval()
    batch = torch.randn(64, 2048)
    times = measure_times(wide, [batch], ("int8", "int4[g64]"), repeats=5)
    assert set(times.layers) == {(path, text) for path in "02" for text in ("int8", "int4[g64]")}
    # Thirty-two times the work of the small layer is seen, whatever else the machine does meanwhile.
    assert times.of("0", "int8") > 3 * times.of("2", "int8") > 0
    assert times.rest >= 0 and "[64, 2048]" in times.about
    assert type(wide[0]) is nn.Linear
    with pytest.raises(bf.BitfoldError, match="no batches"):
        measure_times(wide, [], ("int8",))
    with pytest.raises(bf.BitfoldError, match="there is no time"):
        times.of("0", "int3[g32]")


def test_a_gpus_times_follow_from_bytes_for_one_row() -> None:
    """At one row a linear is as fast as its codes are read, whatever the layer: int4 near half of int8."""
    big = nn.Sequential(nn.Linear(8192, 8192, bias=False), nn.Linear(8192, 1024, bias=False))
    times = model_times(big, [torch.randn(1, 8192)], ("int8", "int4[g128]"), card=device("NVIDIA H200"))
    assert 1 < times.of("0", "int8") / (8192 * 8192 / 4.46e12) < 1.6
    assert 0.4 < times.of("0", "int4[g128]") / times.of("0", "int8") < 0.75
    assert times.of("1", "int8") < 0.5 * times.of("0", "int8")
    many = model_times(big, [torch.randn(4096, 8192)], ("int8",), card=device("NVIDIA H200"))
    assert many.of("0", "int8") > 5 * times.of("0", "int8")


def test_a_trace_ranks_layers_as_measuring_does() -> None:
    exact = sensitivity(unequal(), data(), FORMATS)
    found = trace_sensitivity(unequal(), data(), FORMATS, draws=16)
    assert found.numel == exact.numel
    bits = {(c.layer, c.format): c.bits for c in exact.choices}
    assert {(c.layer, c.format): c.bits for c in found.choices} == bits
    # The second derivative says nearly all of a rounding as small as this: within a factor of two.
    for layer in ("first", "last"):
        ratio = found.loss(layer, "int4[g32]") / exact.loss(layer, "int4[g32]")
        assert 0.5 < ratio < 2, layer
    assert found.loss("second", "int4[g32]") < 0.01 * found.loss("last", "int4[g32]")


def test_search_by_trace() -> None:
    before = unequal()
    recipe = bf.search(before, data(), budget="4 bits", formats=FORMATS, by="trace")
    texts = {rule.match: rule.weight for rule in recipe.rules}
    assert texts.get("second", texts["*"]) == "int2[g32]"
    assert all(parameter.requires_grad for parameter in before.parameters())
    assert all(parameter.grad is None for parameter in before.parameters())
    with pytest.raises(bf.BitfoldError, match="can only be measured"):
        bf.search(unequal(), data(), budget="4 bits", by="trace", loss=lambda a, b: (a - b).abs().mean())
