"""The benchmark of algorithms without its model: what it computes from losses, and its table."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("ptq")


def test_shares_and_intervals(script: Any) -> None:
    torch.manual_seed(0)
    base = torch.rand(200).double() + 3
    rounding, ours = base + 0.02 + 0.001 * torch.randn(200), base + 0.005 + 0.001 * torch.randn(200)
    share = script.won(ours, base, rounding)
    assert share == pytest.approx(1 - math.expm1(0.005) / math.expm1(0.02), abs=0.02)
    low, high = script.interval(ours, base, rounding)
    assert low < share < high < low + 0.1  # draws are of pairs: the windows' own spread cancels
    low, high = script.interval(base, base, None)
    assert low < script.perplexity(base) < high
    assert math.isnan(script.won(base, base, base))


def test_every_variant_is_an_algorithm(script: Any) -> None:
    from bitfold.lowering.algorithms.algorithm import algorithm_of

    for variants in script.ALGORITHMS.values():
        for text in variants:
            assert str(algorithm_of(text)) == text
    for text in script.FORMATS:
        assert script.recipe(text).rules[0].weight


def test_bits_count_scales(script: Any) -> None:
    model = script.SmallLlama()
    assert script.bits(model, "int4[g64]") == 4.25
    assert script.bits(model, "int4[g64] x int8") == 4.25
    assert script.bits(model, "mxfp4") == 4.25
    assert script.bits(model, "nvfp4") == pytest.approx(4.5, abs=1e-3)


def test_the_committed_model_opens(script: Any) -> None:
    model = script.load()
    logits = model(torch.randint(4096, (1, 16)))
    assert logits.shape == (1, 16, 4096) and torch.isfinite(logits).all()
    from transformers import LlamaForCausalLM

    twin = LlamaForCausalLM.from_pretrained(script.FOLDER, dtype=torch.float32).eval()
    ids = torch.randint(4096, (1, 16))
    assert torch.allclose(twin(ids).logits, model(ids), atol=1e-4)


def test_the_table(script: Any) -> None:
    rows = [
        {"format": "int4[g64]", "algorithm": "rounding", "variant": None, "bits": 4.25, "perplexity": 28.5,
         "interval": [25, 32], "change": 0.03, "divergence": 0.02, "seconds": 3.0, "peak_mib": 10.0},
        {"format": "int4[g64]", "algorithm": "gptq", "variant": "gptq", "bits": 4.25, "perplexity": 28.0,
         "interval": [25, 31], "change": 0.01, "divergence": 0.01, "seconds": 60.0, "peak_mib": 20.0,
         "won": 0.6, "won_interval": [0.5, 0.7]},
    ]  # fmt: skip
    worse = rows[1] | {"won_divergence": -0.11}
    assert "(11% more)" in script.table(
        {"float": {"test": 27.7, "interval": [24, 30]}, "rows": [rows[0], worse]}
    )
    lines = script.table({"float": {"test": 27.7, "interval": [24, 30]}, "rows": rows}).splitlines()
    assert lines[0] == "Float: 27.700 (24.00 to 30.00)."
    assert lines[-1] == (
        "| int4[g64] | gptq (`gptq`) | 4.25 | 28.000 (25.00 to 31.00) | +1.00% | "
        "**60% (50% to 70%)** | 10.00 | 1.00 | 20 MiB |"
    )
