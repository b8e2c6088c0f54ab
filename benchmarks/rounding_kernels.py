"""The kernels that round in training, alone: their time over that of a copy, and bytes a second.

In: a GPU. Out: a JSON with a row for each format, direction, tile and warps (0: as the library has it).

    python benchmarks/rounding_kernels.py --out benchmarks/results/rounding-nvidia-h200.json

A forward kernel reads numbers and writes them, as a copy does; one of gradients reads numbers and gradients
and writes gradients. The numbers are 28672 x 4096 in bfloat16, 235 MB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_timing import card, microseconds
from qat_report import write
from torch import Tensor

from bitfold.codegen.rounding import RoundingSpec, rounding_spec
from bitfold.codegen.triton import rounding_build
from bitfold.formats import format

CASES = (
    *(("int4[g32]", "forward"), ("int4[g128]", "forward"), ("int8", "forward"), ("mxfp4", "forward")),
    *(("int4[g32]", "clip"), ("int4[g32]", "lsq")),
)
TILES = ((1024, 1), (1024, 2), (2048, 2), (2048, 4), (4096, 4), (4096, 8))


def tiled(spec: RoundingSpec, tile: int, warps: int, run: Callable[[], Any]) -> float:
    """Microseconds of a run with programs of `tile` numbers."""
    options = {"num_warps": warps, "enable_fp_fusion": False}
    rounding_build.kernel.cache_clear()
    with (
        mock.patch.object(RoundingSpec, "rows", property(lambda s: max(1, tile // s.wide))),
        mock.patch.object(rounding_build, "options", lambda s: options),
    ):
        return microseconds([run], 9)


def rows_of(x: Tensor, text: str, direction: str, copy: float) -> list[dict[str, Any]]:
    """A row for each tile, and one (tile 0) for what the library takes."""
    given = direction != "forward"
    spec = rounding_spec(format(text), "bf16", x.shape[1], direction, given)
    scales = list(format(text).choose(x)) if given else []
    gradient = torch.randn_like(x)

    def run() -> Any:
        if given:
            return rounding_build.gradients(spec, x, scales, gradient)
        return rounding_build.rounded(spec, x, scales)

    found = []
    for tile, warps in ((0, 0), *((t, w) for t, w in TILES if t >= spec.wide)):
        us = tiled(spec, tile, warps, run) if tile else microseconds([run], 9)
        moved = x.nbytes * (3 if given else 2)
        found.append({
            "format": text, "direction": direction, "tile": tile, "warps": warps, "us": us,
            "of a copy": us / copy, "bytes a second": moved / us * 1e6,
        })  # fmt: skip
        print(found[-1], flush=True)
    rounding_build.kernel.cache_clear()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.manual_seed(0)
    x = torch.randn(28672, 4096, device="cuda", dtype=torch.bfloat16)
    copy = microseconds([lambda: x.clone()], 9)
    rows = [row for text, direction in CASES for row in rows_of(x, text, direction, copy)]
    write(out, {**card(), "copy_us": copy, "rows": rows})
    for row in rows:
        if not row["tile"]:
            print(f"{row['format']} {row['direction']}: {row['us']:.1f} us, {row['of a copy']:.2f} of a copy")


if __name__ == "__main__":
    main()
