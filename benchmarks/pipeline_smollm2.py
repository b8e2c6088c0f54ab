"""Time of the pass pipeline, without compilation, on SmolLM2 captured as one program.

In: recipes. Out: a table of seconds a pass, and `results/pipeline_smollm2.json`.

    python benchmarks/pipeline_smollm2.py --recipe int8 int4[g64] mxfp4 nf4

Capture is not counted, and lowering (the repacking of weights for a target) is. Wall time, best of two.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from bitfold.lowering import Pipeline
from bitfold.tools.page import captured, twin
from bitfold.tools.smollm2 import load_smollm2

RESULTS = Path(__file__).parent / "results" / "pipeline_smollm2.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", nargs="+", default=["int8", "int4[g64]", "mxfp4", "nf4"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    model = load_smollm2().model
    with torch.no_grad():
        gm = captured(model, torch.randint(0, 1000, (1, 16)))
    rows = []
    for recipe in given.recipe:
        best = None
        for _ in range(2):
            fresh = twin(gm)
            fresh.meta.update({key: value for key, value in gm.meta.items() if key != "bitfold"})
            fresh.meta["bitfold"] = gm.meta["bitfold"].copy()
            pipeline = Pipeline.parse(f'annotate{{recipe="{recipe}"}},fold,fuse,lower{{target=cpu}}')
            started = time.perf_counter()
            trace = pipeline.run(fresh)
            seconds = time.perf_counter() - started
            if best is None or seconds < best["seconds"]:
                passes = {step.name: round(step.seconds, 3) for step in trace.steps[1:]}
                best = {"recipe": recipe, "seconds": round(seconds, 3), "passes": passes}
        assert best is not None
        rows.append(best)
        print(f"{recipe:12} {best['seconds']:6.2f} s   {best['passes']}", flush=True)
    record = {
        "nodes": len(gm.graph.nodes),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    given.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
