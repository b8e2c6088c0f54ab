"""The first call of SmolLM2's compiled decode step in a process with warm caches, and what it is made of.

In: who, how often. Out: a line for each, and the numbers as JSON.

    python benchmarks/cpu_first_call.py --who int8_all float32 --repeats 5 --out cpu-first-call-NAME.json

`float32` is the model as it is behind Dynamo's backend "eager", which compiles nothing: what tracing and
guards alone take. Any other name is a recipe: `bf.quantize`, then torch.compile(backend="bitfold"). Each
repeat is a process of its own; one more, which is not counted, fills the caches if `--fill` is given.
Of the garbage collector's time and runs only those within the first call count.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cpu_decode import BEFORE, PHASES, torch_model


class Collections:
    """What the garbage collector did while it was looked at."""

    def __init__(self) -> None:
        self.seconds, self.runs, self.started = 0.0, [0, 0, 0], 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self.started = time.perf_counter()
            return
        self.seconds += time.perf_counter() - self.started
        self.runs[info["generation"]] += 1


def one(who: str) -> dict[str, Any]:
    """The first call of this process."""
    import torch
    from transformers import StaticCache

    model, how = torch_model(who)
    if who == "float32":
        how = {"backend": "eager"}
    cache = StaticCache(config=model.config, max_cache_len=128)
    run = torch.compile(model, dynamic=False, **how)
    with torch.inference_mode():
        model(torch.randint(100, 1000, (1, BEFORE)), past_key_values=cache, use_cache=True)
        ids = torch.randint(100, 1000, (1, 1))
        collections = Collections()
        gc.callbacks.append(collections)
        started = time.perf_counter()
        run(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - started
        gc.callbacks.remove(collections)
    names, took = torch._dynamo.utils.compile_times("csv", aggregate=True)
    phases = {name: float(took[names.index(name)]) for name in PHASES if name in names}
    return {"s": seconds, "phases": phases, "gc_s": collections.seconds, "gc_runs": collections.runs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--who", nargs="+", default=["int8_all", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--fill", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    if given.one:
        return print(json.dumps(one(given.one)))
    from cpu import processor

    rows = []
    for who in given.who:
        command = [sys.executable, "-W", "ignore", __file__, "--one", who, "--threads", str(given.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
        told = []
        for _ in range(given.repeats + given.fill):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
            told.append(json.loads(done.stdout.splitlines()[-1]))
        told = told[given.fill :]
        rows.append({"who": who, "median_s": statistics.median(run["s"] for run in told), "runs": told})
        print(f"{who:14} {rows[-1]['median_s']:.2f} s  {[round(run['s'], 2) for run in told]}", flush=True)
    if given.out:
        where = {"machine": processor(), "torch": torch.__version__, "threads": given.threads}
        given.out.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
