"""What a step of decoding costs on a CPU beside its products, and attention over a cache by itself.

In: options. Out: microseconds, and the numbers as JSON.

    python benchmarks/cpu_overhead.py --out benchmarks/results/cpu-overhead-NAME.json

A Llama of thirty layers with SmolLM2's heads (nine, three of keys, 64 numbers) whose products have next to no
numbers, decoded through torch.compile(backend="bitfold"): as it is compiled; with the layers that repeat left
in one graph, behind Inductor's Python wrapper; and that with torch's attention too. Then one attention of one
query, called from Python. One thread, whose own time is counted, so that the machine may be in use; the best
of the repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cpu import processor
from torch import Tensor

import bitfold as bf
from bitfold.codegen.attention import AttentionSpec, cache_format, empty_cache

TINY = {
    "hidden_size": 72, "intermediate_size": 64, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 64, "vocab_size": 64, "tie_word_embeddings": True,
}  # fmt: skip
HEADS, KV, DIM = 9, 3, 64
CACHES = ["int8[bf16]", "int4[g32]", "float8_e4m3fn[bf16]"]
# What is left out of a compiled step -> functions of `bitfold.lowering.cpu.target` that find nothing then.
WITHOUT = {
    "as it is": [],
    "one graph": ["compile_repeats"],
    "one graph, torch's attention": ["compile_repeats", "few_queries"],
}


def best(call: Callable[[], Any], before: Callable[[], Any] | None = None, repeats: int = 300) -> float:
    """Microseconds of the thread's own time."""
    found = float("inf")
    for _ in range(repeats):
        if before is not None:
            before()
        started = time.thread_time()
        call()
        found = min(found, time.thread_time() - started)
    return found * 1e6


def step(layers: int, without: str) -> dict[str, Any]:
    """What a row is measured by: a compiled step, what takes its cache back, and seconds until it ran."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    config = LlamaConfig(num_hidden_layers=layers, **TINY)
    model = LlamaForCausalLM(config).eval()
    bf.quantize(model, "int8_all")
    cache = StaticCache(config=config, max_cache_len=128)
    run = torch.compile(model, backend="bitfold", options={"recipe": "none"}, dynamic=False)
    token = torch.zeros(1, 1, dtype=torch.int64)
    model(torch.arange(16)[None], past_key_values=cache, use_cache=True)

    def back() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(16)

    def call() -> Any:
        return run(token, past_key_values=cache, use_cache=True)

    with contextlib.ExitStack() as patched:
        for name in WITHOUT[without]:
            found = None if name == "compile_repeats" else 0
            patched.enter_context(
                mock.patch(f"bitfold.lowering.cpu.target.{name}", lambda *_, found=found: found)
            )
        started = time.perf_counter()
        call()
    return {"call": call, "back": back, "compile_s": time.perf_counter() - started}


def steps(layers: int, rounds: int = 5) -> list[dict[str, Any]]:
    """Rows: each kind of step, in turns, so that all of them have the machine at its best."""
    made = {without: step(layers, without) for without in WITHOUT}
    rows = {without: {"step": without, "compile_s": one["compile_s"]} for without, one in made.items()}
    for stance in ("with guards", "us"):
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=stance == "us"):
            for _ in range(rounds):
                for without, one in made.items():
                    found = best(one["call"], one["back"], 100)
                    rows[without][stance] = min(found, rows[without].get(stance, found))
    return list(rows.values())


def attention(tokens: int) -> list[dict[str, Any]]:
    """Rows: one query over so many tokens, by each kind of cache."""
    q, (k, v) = torch.randn(1, HEADS, 1, DIM), torch.randn(2, 1, KV, tokens, DIM)
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    sdpa, ops = torch.nn.functional.scaled_dot_product_attention, torch.ops.bitfold
    calls: dict[str, Callable[[], Tensor]] = {
        "float32, torch": lambda: sdpa(q, k, v, attn_mask=mask, enable_gqa=True),
        "float32": lambda: ops.few_queries(q, k, v, mask, DIM**-0.5),
    }
    limits, at = torch.tensor([[tokens]]), torch.arange(tokens)[None]
    for text in CACHES:
        fmt = cache_format(text, DIM)
        spec = AttentionSpec(HEADS, KV, DIM, "f32", fmt, fmt)
        held = empty_cache(spec, 1, tokens)
        ops.cache_write(held, k, v, at, None, str(spec))
        calls[text] = lambda held=held, said=str(spec): ops.attend_few(q, held, limits, None, None, said)
    right = calls["float32, torch"]()
    rows = []
    for name, call in calls.items():
        error = float((call() - right).norm() / right.norm())
        assert error < {"int4[g32]": 0.2}.get(name, 0.05), (name, error)
        rows.append({"attention": name, "tokens": tokens, "us": best(call, repeats=1000), "error": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30, help="0: attention alone")
    parser.add_argument("--tokens", nargs="*", type=int, default=[128, 2048])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [row for tokens in given.tokens for row in attention(tokens)]
        rows += steps(given.layers) if given.layers else []
    for row in rows:
        print(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
                        for name, value in row.items()))  # fmt: skip
    if given.out:
        record = {"machine": processor(), "torch": torch.__version__, "layers": given.layers, "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
