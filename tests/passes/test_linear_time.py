"""The passes' work grows in a straight line with the graph, counted in calls, which no load disturbs."""

from __future__ import annotations

import cProfile
import importlib.util
import pstats
from pathlib import Path
from typing import Any

from bitfold.passes import Pipeline


def benchmark() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "pipeline_scaling.py"
    spec = importlib.util.spec_from_file_location("benchmark_scaling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_calls_are_linear_in_nodes() -> None:
    script = benchmark()
    pipeline = Pipeline.parse(script.DEFAULT)
    script.measure(60, pipeline, 1)  # imports and caches

    def calls(nodes: int) -> tuple[int, int]:
        profile = cProfile.Profile()
        row = profile.runcall(script.measure, nodes, pipeline, 1)
        total: Any = pstats.Stats(profile)
        return row["nodes"], total.total_calls

    (few, low), (many, high) = calls(300), calls(1200)
    # A pass that walks the graph once for each layer would add 200 x 1200 steps to about 2,000 a layer.
    assert high / low < 1.1 * many / few, (low, high)
