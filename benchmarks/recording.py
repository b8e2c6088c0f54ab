"""What recording a trace costs: the same pipeline with and without it, on SmolLM2 captured as one program.

In: recipes. Out: a table, and `results/recording.json`.

    python benchmarks/recording.py --recipe int8 mxfp4 --runs 5

With and without take turns, and each is told by its fastest run, of processor time: the passes run on one
thread for the most part, and what else the machine does counts for nothing. `share`: of the recorded run's
time."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from torch.fx import GraphModule

from bitfold.lowering import Pipeline
from bitfold.tools.lowered import twin
from bitfold.tools.page import captured
from bitfold.tools.smollm2 import load_smollm2

RESULTS = Path(__file__).parent / "results" / "recording.json"


def seconds(pipeline: Pipeline, gm: GraphModule, *, record: bool) -> float:
    """Processor time of one run."""
    copy = twin(gm)
    began = time.process_time()
    pipeline.run(copy, record=record)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", nargs="+", default=["int8", "int4[g64]", "mxfp4"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    with torch.no_grad():
        gm = captured(load_smollm2().model, torch.randint(0, 1000, (1, 16)))
    rows = []
    for recipe in given.recipe:
        pipeline = Pipeline.parse(f'annotate{{recipe="{recipe}"}},fold,fuse,lower{{target=cpu}}')
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(given.runs):
            for record in times:
                times[record].append(seconds(pipeline, gm, record=record))
        on, off = min(times[True]), min(times[False])
        rows.append(
            {
                "recipe": recipe,
                "recorded": round(on, 3),
                "not": round(off, 3),
                "share": round(1 - off / on, 4),
            }
        )
        print(f"{recipe:12} {on:6.2f} s recorded, {off:6.2f} s not: {100 * (1 - off / on):.1f} %", flush=True)
    record = {
        "nodes": len(gm.graph.nodes),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "runs": given.runs,
        "rows": rows,
    }
    given.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
