"""Where a network's time goes in static int8 on a CPU: each kernel alone, products and results.

In: options. Out: a table, a line for each kind of layer, and the numbers as JSON.

    ATEN_CPU_CAPABILITY=avx2 python benchmarks/cpu_conv_layers.py --models lite0 --out layers.json
    depthwise 5x5     7 calls   1.93 ms   12.1 GMAC/s   31% of the yardstick   0.21 ns a number of the result

A kernel's own inputs, as the network makes them of a random image, are in the cache when it is called again;
of its calls the best counts. The yardstick is what the same instructions do where nothing is in their way:
the products of a layer of 1024 x 1024 on 256 pixels, results left as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cpu_conv import processor
from cpu_conv_models import MODELS, build
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

import bitfold as bf
from bitfold.codegen.conv import ConvSpec, panels
from bitfold.codegen.cpp.conv_build import know
from bitfold.codegen.cpp.vectors import widest
from bitfold.formats import format

CONV = torch.ops.bitfold.conv.default


@dataclass
class Layer:
    """One call of a kernel: products, numbers of the result, microseconds."""

    text: str
    products: int
    results: int
    us: float

    @property
    def kind(self) -> str:
        """The table's lines."""
        spec = ConvSpec.parse(self.text)
        size = "x".join(map(str, spec.kernel)) or "rows"
        if spec.depthwise:
            return f"depthwise {size}"
        return f"{size} {'wider' if spec.n > spec.k * spec.groups else 'narrower'}"


def best(run: Callable[[], object], seconds: float) -> float:
    """Microseconds of the best call."""
    run()
    found, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        found = min(found, time.perf_counter() - started)
    return 1e6 * found


class Timed(Interpreter):
    """Runs a program, and each kernel of it many times."""

    def __init__(self, gm: GraphModule, seconds: float) -> None:
        super().__init__(gm)
        self.seconds, self.layers = seconds, list[Layer]()

    def run_node(self, n: Node) -> Any:
        found = super().run_node(n)
        if n.target is CONV:
            args, _ = self.fetch_args_kwargs_from_env(n)
            spec = ConvSpec.parse(args[1])
            results = found[0].numel()
            us = best(lambda: CONV(*args), self.seconds)
            self.layers.append(Layer(args[1], results * spec.products, results, us))
        return found


def yardstick(positive: bool, seconds: float) -> float:
    """Products a nanosecond of a large layer."""
    f = format("int8").with_layout(panels(1024, 1024, 1, 1))
    spec = ConvSpec(f, format("int8[tensor]"), 1024, 1024, positive=positive)
    know([spec])
    x = torch.randint(0, 127, (256, 1024), dtype=torch.uint8)
    codes = torch.randint(0, 255, (1024 * 1024,), dtype=torch.uint8).reshape(1024, 1024)
    inputs: list[Tensor] = [x, torch.ones(1), codes, torch.ones(1024, 1)]
    return 256 * 1024 * 1024 / (1e3 * best(lambda: CONV(inputs, str(spec)), seconds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["lite0"], choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=0.3, help="of each kernel")
    parser.add_argument("--each", action="store_true", help="a line for each call too")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    peak = yardstick(True, 1.0)
    print(f"{processor()}, {widest().name}: {peak:.1f} products a ns")
    rows: dict[str, Any] = {}
    for name in given.models:
        model, shape = build(name)
        data = [torch.randn(1, *shape) for _ in range(2)]
        with torch.inference_mode():
            gm = bf.quantize(model, "int8_static", scope="program", calibration=data)
            timed = Timed(gm, given.seconds)
            timed.run(data[0])
        rows[name] = [asdict(layer) for layer in timed.layers]
        printed(name, timed.layers, peak, given.each)
    if given.out:
        about = {"processor": processor(), "vectors": widest().name, "torch": torch.__version__}
        about |= {"products a ns": peak, "models": rows}
        given.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def printed(name: str, layers: list[Layer], peak: float, each: bool) -> None:
    """One line for each kind of layer, the slowest first."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    lines = {**kinds, "all": layers}
    if each:
        lines |= {f"{i} {one.text}": [one] for i, one in enumerate(layers)}
    for kind, some in lines.items():
        us, products = sum(one.us for one in some), sum(one.products for one in some)
        rate, results = products / us / 1e3, sum(one.results for one in some)
        share, each_of = 100 * rate / peak, 1e3 * us / results
        print(
            f"{name} {kind[:70]:18} {len(some):3} calls {us / 1e3:7.3f} ms, {products / 1e6:6.1f} M products,"
            f" {rate:5.1f} a ns, {share:3.0f}% of the yardstick; {each_of:.3f} ns a result"
        )


if __name__ == "__main__":
    main()
