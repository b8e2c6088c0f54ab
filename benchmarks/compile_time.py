"""Time to compile a Llama of SmolLM2's shape: backend="bitfold" against plain Inductor, prefill and decode.

In: options. Out: a table, and the numbers as JSON in benchmarks/results/compile_time.json.

    python benchmarks/compile_time.py --layers 30 --recipes int8 int4[g64] q4_1

Each backend runs in a process of its own with empty compile caches. What is timed is the first call of a
prefill of 16 tokens and the first call of a decode step, capture, passes and the C++ compiler included, in
seconds of processor time, since other programs on the machine do not lengthen those; then a step of decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "compile_time.json"
PLAIN = "inductor"


def measure(recipe: str, layers: int) -> dict[str, Any]:
    """Seconds to compile, and milliseconds a token, of one backend in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    passes: list[Any] = []
    if recipe == PLAIN:
        compiled = torch.compile(model, dynamic=False)
    else:
        options = {"recipe": recipe, "trace": passes}
        compiled = torch.compile(model, backend="bitfold", options=options, dynamic=False)
    cache = StaticCache(config=config, max_cache_len=64)
    tokens = torch.randint(0, 49152, (1, 16))
    found: dict[str, Any] = {"backend": recipe}
    with torch.inference_mode():
        started = processor_seconds()
        compiled(tokens, past_key_values=cache, cache_position=torch.arange(16), use_cache=True)
        found["prefill_s"] = processor_seconds() - started
        started = processor_seconds()
        step(compiled, cache, 16)
        found["decode_s"] = processor_seconds() - started
        times = []
        for position in range(17, 60):
            started = time.perf_counter()
            step(compiled, cache, position)
            times.append(time.perf_counter() - started)
    found["passes_s"] = sum(one.seconds for trace in passes for one in trace.steps)
    found["token_ms"] = sorted(times)[len(times) // 2] * 1e3
    return found


def processor_seconds() -> float:
    """Of this process and of those it has started: the C++ compiler among them."""
    own, started = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + started.ru_utime + started.ru_stime


def step(compiled: Any, cache: Any, position: int) -> None:
    """One token."""
    import torch

    compiled(
        torch.tensor([[position]]),
        past_key_values=cache,
        cache_position=torch.tensor([position]),
        use_cache=True,
    )


def in_own_process(recipe: str, layers: int) -> dict[str, Any]:
    """`measure` with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, __file__, "--layers", str(layers), "--one", recipe]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--recipes", nargs="+", default=["int8", "int4[g64]", "q4_1"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.layers)))
        return
    rows = [in_own_process(recipe, given.layers) for recipe in [PLAIN, *given.recipes]]
    plain = rows[0]["prefill_s"] + rows[0]["decode_s"]
    print(f"{'':12} {'prefill':>8} {'decode':>8} {'passes':>8} {'ratio':>6} {'ms/token':>9}")
    for row in rows:
        row["ratio"] = (row["prefill_s"] + row["decode_s"]) / plain
        print(
            f"{row['backend']:12} {row['prefill_s']:7.1f}s {row['decode_s']:7.1f}s {row['passes_s']:7.1f}s "
            f"{row['ratio']:6.2f} {row['token_ms']:9.2f}"
        )
    given.out.write_text(json.dumps({"layers": given.layers, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
