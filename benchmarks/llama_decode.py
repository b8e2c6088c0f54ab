"""Decode of a Llama-3-8B-shaped model: bf16, torchao's variants and ours, under CUDA graphs, in one run.

In: options. Out: a table of milliseconds a token, and the numbers as JSON.

    python benchmarks/llama_decode.py --out llama.json
    python benchmarks/llama_decode.py --variants bf16 bitfold-int4 --batches 1 --layers 8
    python benchmarks/llama_decode.py --tiny --layers 2 --variants bf16 bitfold-int4      on a CPU too

One process a variant, with compile caches of its own, so that compile times are those of a first call. Each
takes the same token at the same place of a static cache over and over; a median of wall times over many steps
counts. Before that the logits of the compiled step are held against those that plain torch computes from the
same weights, decoded, and two runs of it against each other. Memory is what stays allocated, and the most
while it ran.

`bitfold-A+B` quantizes by both recipes in the graph of the whole model, as a cache in codes needs it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from llama import LLAMA_8B, TINY, Llama, Sizes, build, inputs
from torch import Tensor, nn

RECIPES = ["int4", "int4_all", "int8", "fp8", "fp8_dynamic", "int8_dynamic", "int4+kv_int8"]
TORCHAO = ["int4-tinygemm", "int4-plain", "int8", "fp8", "fp8_dynamic"]
VARIANTS = ["bf16", *(f"bitfold-{name}" for name in RECIPES), *(f"torchao-{name}" for name in TORCHAO)]
# Thirty-two layers of random weights make 0.06 of the roundings of bfloat16 in another order. Activations in
# 8 bits are another matter, to which they are as sensitive; nonsense is 1.4 away.
MOST_ERROR, MOST_OF_DYNAMIC = 0.2, 1.0
Row = dict[str, Any]


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=VARIANTS, type=variant, metavar="VARIANT")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--layers", type=int, default=LLAMA_8B.layers)
    parser.add_argument("--tiny", action="store_true", help="a width of 256, for trying this script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--target", help="of ours; by default the device's")
    parser.add_argument("--steps", type=int, default=64, help="tokens of one measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements, of which the median counts")
    parser.add_argument("--limit", type=float, default=560, help="seconds for everything")
    parser.add_argument("--variant-limit", type=float, default=240, help="seconds for one process")
    parser.add_argument("--out", type=Path, default=Path("llama_decode.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def variant(text: str) -> str:
    """A name that this script knows: bf16, torchao-X, bitfold-RECIPE, or bitfold-RECIPE+RECIPE."""
    kind, _, name = text.partition("-")
    if text == "bf16" or (kind == "torchao" and name in TORCHAO) or (kind == "bitfold" and name):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no variant; there are {', '.join(VARIANTS)}")


def sizes(given: argparse.Namespace) -> Sizes:
    return replace(TINY if given.tiny else LLAMA_8B, layers=given.layers)


def torchao(model: nn.Module, name: str) -> nn.Module:
    """All linears but the head, as `quantize_` does it."""
    from torchao import quantization as q

    configs: dict[str, Callable[[], Any]] = {
        "int4-tinygemm": lambda: q.Int4WeightOnlyConfig(
            group_size=128, int4_packing_format="tile_packed_to_4d"
        ),
        "int4-plain": lambda: q.Int4WeightOnlyConfig(group_size=128),
        "int8": lambda: q.Int8WeightOnlyConfig(),
        "fp8": lambda: q.Float8WeightOnlyConfig(),
        "fp8_dynamic": lambda: q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow()),
    }
    q.quantize_(model, configs[name](), lambda m, path: isinstance(m, nn.Linear) and path != "lm_head")
    return model


def bitfold(model: nn.Module, name: str, example: tuple[Tensor, ...], target: str | None) -> nn.Module:
    """Ahead of time: module by module, or as one graph where two recipes are meant, one of them a cache's."""
    import bitfold as bf

    if "+" not in name:
        folded: nn.Module = bf.quantize(model, name, target=target)
        return folded
    rules = [rule for one in name.split("+") for rule in bf.Recipe.parse(one).rules]
    recipe = bf.Recipe(name, tuple(rules))
    program: nn.Module = bf.quantize(model, recipe, scope="program", example_inputs=example, target=target)
    return program


def prepared(
    given: argparse.Namespace, model: Llama, example: tuple[Tensor, ...]
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a variant, and how it is compiled."""
    kind, _, name = given.one.partition("-")
    if kind == "bitfold":
        made = bitfold(model, name, example, given.target)
        chosen = {"recipe": "none", "mode": "reduce-overhead", "inference": True}
        chosen |= {"target": given.target} if given.target else {}
        return made, {"backend": "bitfold", "options": chosen}
    made = torchao(model, name) if kind == "torchao" else model
    return made, {"mode": "reduce-overhead"}


def measure(given: argparse.Namespace, batch: int) -> Row:
    """One row: error, seconds and bytes of a variant at one batch."""
    s, cuda = sizes(given), given.device.startswith("cuda")
    row: Row = {"variant": given.one, "batch": batch, "layers": s.layers, "ms": None}
    model, example = build(s, batch, given.device), inputs(s, batch, given.device)
    started = time.perf_counter()
    ready, how = prepared(given, model, example)
    settle(cuda)
    row["quantize_s"] = round(time.perf_counter() - started, 2)
    del model
    want = decoded_logits(given, ready, batch, example)
    clean(cuda)
    fast = torch.compile(ready, fullgraph=True, **how)
    started = time.perf_counter()
    with torch.inference_mode():
        first = fast(*example).float().clone()
        for _ in range(3):  # a CUDA graph is recorded in the second call, and replayed from the third on
            last = fast(*example).float().clone()
        settle(cuda)
        row["compile_s"] = round(time.perf_counter() - started, 2)
        row["error"] = float((first - want).norm() / want.norm())
        most = MOST_OF_DYNAMIC if "dynamic" in given.one else MOST_ERROR
        if not row["error"] <= most:
            return row | {"failed": f"the logits are {row['error']:.2f} off those of the decoded weights"}
        row["repeats"] = bool(torch.equal(last, fast(*example).float()))
        row["ms"] = timed(fast, example, given, cuda)
    row["weights"] = sum(t.nbytes for t in {id(t): t for t in held(ready)}.values())
    if cuda:
        row |= {"memory": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    return row


def decoded_logits(
    given: argparse.Namespace, ready: nn.Module, batch: int, example: tuple[Tensor, ...]
) -> Tensor:
    """What plain torch makes of the weights that `ready` holds; of those that it was made of, where they are
    inputs of a program."""
    s = sizes(given)
    if "+" in given.one:
        recipe = given.one.partition("-")[2].partition("+")[0]
        ready = bitfold(build(s, batch, given.device), recipe, example, given.target)
    twin = build(s, batch, given.device)
    with torch.inference_mode():
        for path, module in twin.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                weight: Any = ready.get_submodule(path).weight
                plain = weight.dequantize() if hasattr(weight, "dequantize") else weight
                module.weight.copy_(plain)
        logits: Tensor = twin(*example)
        return logits.float()


def held(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def timed(
    fast: Callable[..., Tensor], example: tuple[Tensor, ...], given: argparse.Namespace, cuda: bool
) -> float:
    """Milliseconds a token: the median of means over `steps` tokens, each of whose logits is kept."""
    found = []
    for _ in range(given.repeats):
        settle(cuda)
        started = time.perf_counter()
        for _ in range(given.steps):
            fast(*example).clone()
        settle(cuda)
        found.append((time.perf_counter() - started) / given.steps * 1e3)
    return round(statistics.median(found), 4)


def settle(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def clean(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def child(given: argparse.Namespace) -> None:
    """Rows of one variant, on disk after each batch."""
    rows: list[Row] = []
    for batch in given.batches:
        try:
            row = measure(given, batch)
        except ImportError:
            raise
        except Exception as refused:  # theirs or ours, the row says it
            row = {"variant": given.one, "batch": batch, "ms": None, "failed": repr(refused)[:300]}
        rows.append(row)
        given.out.write_text(json.dumps(rows))
        torch.compiler.reset()
        clean(given.device.startswith("cuda"))


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Every variant in a process of its own, as far as the time goes; --out is rewritten after each."""
    deadline = time.monotonic() + given.limit
    found: dict[str, Any] = {**where(given.device), "sizes": asdict(sizes(given)), "absent": {}, "rows": []}
    for name in given.variants:
        left = min(deadline - time.monotonic(), given.variant_limit)
        if left < 1:
            found["absent"][name] = "not begun: the time was up"
            continue
        with tempfile.TemporaryDirectory() as folder:
            out, began = Path(folder) / "rows.json", time.monotonic()
            status, printed = finished(command(given, name, out), folder, left)
            found["rows"] += json.loads(out.read_text()) if out.exists() else []
        if status != 0:
            last = (printed.strip().splitlines() or ["nothing printed"])[-1][:300]
            found["absent"][name] = "ended: its time was up" if status is None else last
        note = found["absent"].get(name, "")
        print(f"{name:24} {time.monotonic() - began:5.0f} s   {note}", flush=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def command(given: argparse.Namespace, name: str, out: Path) -> list[str]:
    words = [sys.executable, __file__, "--one", name, "--out", str(out), "--device", given.device]
    words += ["--layers", str(given.layers), "--batches", *map(str, given.batches)]
    words += ["--steps", str(given.steps), "--repeats", str(given.repeats)]
    words += ["--target", given.target] if given.target else []
    return [*words, *(["--tiny"] if given.tiny else [])]


def finished(words: list[str], folder: str, seconds: float) -> tuple[int | None, str]:
    """(exit status, None if its time was up; what it printed), with compile caches in `folder`."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
    pipe = subprocess.PIPE
    try:
        done = subprocess.run(
            words, stdout=pipe, stderr=subprocess.STDOUT, text=True, timeout=seconds, env=os.environ | caches
        )
    except subprocess.TimeoutExpired as late:
        return None, (late.stdout or b"").decode(errors="replace") if isinstance(late.stdout, bytes) else ""
    return done.returncode, done.stdout


def where(device: str) -> dict[str, str]:
    """Names and versions that a number is worth nothing without."""
    if device.startswith("cuda"):
        from gpu_timing import card

        return card()
    return {"card": "a CPU", "torch": torch.__version__}


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """[variant, batch, ms a token, times faster than bf16, compile s, GB, GB at most, error] of each row."""
    plain = {row["batch"]: row["ms"] for row in rows if row["variant"] == "bf16"}
    table = []
    for row in rows:
        base, ms = plain.get(row["batch"]), row["ms"]
        cells = [row["variant"], str(row["batch"]), "-" if ms is None else f"{ms:.3f}"]
        cells += [f"{base / ms:.2f}x" if base and ms else "-"]
        cells += [f"{row['compile_s']:.0f}" if "compile_s" in row else "-"]
        sizes = (row.get("memory", row.get("weights")), row.get("peak"))
        cells += ["-" if size is None else f"{size / 1e9:.2f}" for size in sizes]
        table.append([*cells, f"{row['error']:.3f}" if "error" in row else "-"])
    return table


HEADS = ["variant", "batch", "ms a token", "against bf16", "compile s", "GB", "GB at most", "error"]


def markdown(found: dict[str, Any]) -> str:
    """The table, and what has no number and why."""
    rows = [HEADS, ["---", *["---:"] * (len(HEADS) - 1)], *lines(found["rows"])]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    for row in found["rows"]:
        if row.get("failed"):
            text += f"\n\n{row['variant']}, batch {row['batch']}: {row['failed']}"
    return text + "".join(f"\n\nabsent: {name}: {why}" for name, why in found["absent"].items())


def main() -> None:
    given = options()
    if given.one:
        child(given)
        return
    print(markdown(run(given)))


if __name__ == "__main__":
    main()
