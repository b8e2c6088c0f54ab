"""How long SmolLM2's decode step takes until its first token: a saved program, `bf.load` and `bf.compile`.

In: a file for the program. Out: a line, and the numbers as JSON.

    python benchmarks/cpu_start.py --program smollm2.program --threads 2 --out cpu-start-NAME.json

A process captures the step with its static cache, quantizes it and saves it, unless the file is there. A
second process loads and compiles it; a third finds the compiled frame on disk. Each says how long loading and
the first call took, how long the best of the later calls, and how far its first logits are from the program's
own, run without being compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

IDS, POSITION, LENGTH, STEPS = 7, 20, 128, 64


def inputs() -> dict[str, Any]:
    import torch

    return {"input_ids": torch.tensor([[IDS]]), "cache_position": torch.tensor([POSITION])}


def save(path: Path, recipe: str) -> None:
    """The quantized step as a file."""
    from transformers import GenerationConfig
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    import bitfold as bf
    from bitfold.tools.smollm2 import load_smollm2

    model = load_smollm2().model.eval()
    static = {"batch_size": 1, "max_cache_len": LENGTH}
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", max_length=LENGTH, cache_config=static
    )
    step = TorchExportableModuleWithStaticCache(model)
    bf.save(bf.quantize(step, recipe, scope="program", example_inputs=inputs()), path)


def start(path: Path, check: bool) -> dict[str, float]:
    """Seconds of one process, from the file on."""
    import torch

    import bitfold as bf

    given, began = inputs(), time.perf_counter()
    program = bf.load(path)
    loaded = time.perf_counter() - began
    fast, found = bf.compile(program), {"load_s": loaded}
    with torch.inference_mode():
        began = time.perf_counter()
        logits = fast(**given)
        found["first_call_s"] = time.perf_counter() - began
        steps = []
        for _ in range(STEPS):
            began = time.perf_counter()
            fast(**given)
            steps.append(time.perf_counter() - began)
        if check:
            wanted = bf.load(path)(**given)
            found["distance"] = float((logits - wanted).norm() / wanted.norm())
    return found | {"step_ms": 1e3 * min(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--recipe", default="int8_all")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=["save", "start", "check"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one == "save":
        return save(given.program, given.recipe)
    import torch

    torch.set_num_threads(given.threads)
    if given.one:
        return print(json.dumps(start(given.program, given.one == "check")))
    from cpu import processor

    about = {"machine": processor(), "torch": torch.__version__, "threads": given.threads}
    made = {} if given.program.exists() else {"save": child("save", given)}
    rows = made | {"first": child("check", given), "from the cache": child("start", given)}
    print(json.dumps(rows))
    if given.out:
        given.out.write_text(json.dumps(about | {"recipe": given.recipe, "rows": rows}, indent=1) + "\n")
    return None


def child(what: str, given: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own found, and how long it lived."""
    words = ["--program", str(given.program), "--recipe", given.recipe, "--threads", str(given.threads)]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--one", what, *words],
        env={**os.environ, "OMP_NUM_THREADS": str(given.threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if what != "save" else {}
    return found | {"process_s": time.perf_counter() - began}


if __name__ == "__main__":
    main()
