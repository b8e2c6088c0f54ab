"""Post-training quantization on the small decoder: what each algorithm wins back of what rounding loses.

In: the committed model, and token ids (corpus.py). Out: a JSON file, and the table of it: for every algorithm
and format the perplexity of the test text with a bootstrap interval, the divergence from the float model's
predictions, bits a weight with scales counted, minutes, peak memory, and the share of rounding's loss that is
won back.

    python benchmarks/ptq.py --out benchmarks/results/ptq-nvidia-h200.json --processes 12         on a GPU
    python benchmarks/ptq.py --windows 16 --calibration 8 --format "int4[g64]" --first       to try the script

An algorithm has a few variants (its settings); which one is shown is decided on the validation text, format
by format, by the perplexity there (--first takes the first one unseen). `best` is decided among all variants
of all algorithms. Calibration data are windows spread over the whole training text (text_windows.py); if the
texts are not those of the model, the table says so. Everything is computed in float32 on the reference
target, from the bfloat16 weights of the file: what is measured is the rounding. With --processes the variants
are spread over processes that share the device, and their minutes are what they took beside each other.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ptq_numbers import interval, perplexity, won
from ptq_table import table
from small_llama import FOLDER, SmallLlama, load
from text_windows import same_text, windows
from torch import Tensor

import bitfold as bf
from bitfold.passes.recipes import Recipe
from bitfold.passes.rules import Rule
from bitfold.tools.demo import environment

FORMATS = (
    *("int4[g64]", "int3[g32]", "int4[g128]", "int4[g32]", "mxfp4", "nvfp4"),
    *("int4[g64] x int8", "int8_dynamic", "fp8_dynamic"),
)
_FIRST = "follow{share=0.5}"
_TUNED = f"{_FIRST},clip,gptq,descend,refit"
# The first variant of each is what is run with --first.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "clip": ("clip",),
    "hqq": ("hqq",),
    "awq": ("awq,clip",),
    "smooth": ("smooth",),
    "rotate": ("rotate,clip,gptq",),
    "gptq": ("gptq",),
    "gptq, tuned": (_TUNED, "follow,clip,gptq,descend,refit", "clip,gptq,descend,refit"),
    "rotate, tuned": (f"rotate,{_TUNED}",),
    "learned": (f"{_TUNED},learn{{steps=100}}",),
    "whole model": (f"{_TUNED},tune{{rate=0.002}}",),
}
BEST = "best"
# By which variants are chosen: what the table is about. (The divergence there is in the record too.)
JUDGE = "validation"


@dataclass(frozen=True)
class Job:
    """One model to make: a format, and a variant of an algorithm (None: plain rounding)."""

    format: str
    variant: str | None


class Bench:
    """The model, its texts, and what has been measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.patience = arguments.patience
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load(arguments.model).to(self.device)
        self.length = self.model.size.max_position_embeddings
        counts = {"validation": arguments.windows, "test": arguments.windows}
        self.texts = {
            split: windows(arguments.data, split, count, self.length).to(self.device)
            for split, count in counts.items()
        }
        calibration = windows(arguments.data, "train", arguments.calibration, self.length).to(self.device)
        self.batches = [(piece,) for piece in calibration.split(arguments.batch)]

    def quantized(self, text: str, algorithm: str | None) -> tuple[SmallLlama, float, int]:
        """The model in a format, the seconds that it took, and the bytes that it took beside the model."""
        model = copy.deepcopy(self.model)
        began, held = time.perf_counter(), _peak_reset()
        batches = self.batches if algorithm else None
        bf.quantize(model, recipe(text), algorithm=algorithm, calibration=batches, target="reference")
        return model, time.perf_counter() - began, _peak() - held

    def losses(self, model: SmallLlama, split: str) -> tuple[Tensor, Tensor]:
        """For each window, float64, the means over its tokens but the first of the negative log likelihood,
        and of the
        divergence from the float model's predictions (Kullback-Leibler, nats)."""
        found = []
        with torch.no_grad():
            for ids in self.texts[split].split(16):
                exact, ours = (m(ids)[:, :-1].float().log_softmax(-1) for m in (self.model, model))
                likelihood = -ours.gather(-1, ids[:, 1:, None])[..., 0]
                apart = (exact.exp() * (exact - ours)).sum(-1)
                found.append(torch.stack([likelihood, apart]).double().mean(-1).cpu())
        loss, divergence = torch.cat(found, 1)
        return loss, divergence

    def run(self, job: Job) -> dict[str, Any]:
        """What one model loses on both texts, and what it took to make it."""
        model, seconds, memory = self.quantized(job.format, job.variant)
        loss, apart = self.losses(model, "test")
        judged = self.losses(model, "validation")
        return {
            "validation": perplexity(judged[0]),
            "validation_divergence": float(judged[1].mean()),
            "loss": loss,
            "divergence": float(apart.mean()),
            "seconds": round(seconds, 1),
            "peak_mib": round(memory / 2**20, 1),
            "bits": bits(self.model, job.format),
        }


def recipe(text: str) -> Recipe:
    """`int4[g64] x int8`: weights in one format, activations in another, a scale a token; else a recipe's
    text."""
    weight, times, activation = text.partition(" x ")
    return Recipe(text, (Rule(weight=weight, input=activation),)) if times else Recipe.parse(text)


def bits(model: SmallLlama, text: str) -> float:
    """Bits a weight of the linears, scales included."""
    rule = recipe(text).rules[0]
    shapes = [m.weight.shape for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    total = sum(bf.format(rule.weight).bits_per_element(shape) * shape.numel() for shape in shapes)
    return total / sum(shape.numel() for shape in shapes)


def variants(algorithms: list[str], first: bool) -> dict[str, tuple[str, ...]]:
    return {name: ALGORITHMS[name][: 1 if first else None] for name in algorithms}


def results(
    bench: Bench, jobs: list[Job], arguments: argparse.Namespace
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each job with what came of it, as they end."""
    if arguments.processes < 2:
        yield from ((job, bench.run(job)) for job in jobs)
        return
    # Format by format; in each the longest first, so that none is begun when the others are through.
    order = sorted(jobs, key=lambda job: (arguments.format.index(job.format), -_weight(job)))
    context = torch.multiprocessing.get_context("spawn")
    # Not multiprocessing.Pool, which waits without end for the job of a process that was killed.
    pool = ProcessPoolExecutor(arguments.processes, context, _start, (arguments,))
    waiting = {pool.submit(_work, job): job for job in order}
    while waiting:
        ended, _ = wait(waiting, timeout=arguments.patience, return_when=FIRST_COMPLETED)
        if not ended:
            break
        for future in ended:
            job = waiting.pop(future)
            if future.exception() is not None:
                print(f"{job.format} {job.variant}: {future.exception()!r}", file=sys.stderr, flush=True)
                continue
            yield future.result()
    for job in waiting.values():
        print(f"{job.format} {job.variant}: not done after {arguments.patience} s", file=sys.stderr)
    if waiting:
        for process in pool._processes.values():
            process.kill()
    pool.shutdown(wait=not waiting, cancel_futures=True)


def _weight(job: Job) -> int:
    """What takes longer is larger."""
    variant = job.variant or ""
    return len(variant) + 1000 * ("learn" in variant) + 2000 * ("tune{" in variant)


def _start(arguments: argparse.Namespace) -> None:
    global _bench
    torch.set_num_threads(1)
    _bench = Bench(arguments)


def _work(job: Job) -> tuple[Job, dict[str, Any]]:
    # Where a job that takes too long stands is said, before the one that waits for it gives up.
    faulthandler.dump_traceback_later(0.9 * _bench.patience, exit=False)
    try:
        found = _bench.run(job)
    finally:
        faulthandler.cancel_dump_traceback_later()
    # Plain numbers: a tensor would be handed over as an open file, and there are as many as jobs.
    return job, found | {"loss": found["loss"].tolist()}


def measure(bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, written whenever a format is complete, so that an interrupted run has what it had."""
    base = bench.losses(bench.model, "test")[0]
    texts = arguments.format
    tried = variants(arguments.algorithm or list(ALGORITHMS), arguments.first)
    jobs = [Job(text, v) for text in texts for v in (None, *dict.fromkeys(sum(tried.values(), ())))]
    record: dict[str, Any] = {
        "where": environment(bench.device),
        "asked": {k: v for k, v in vars(arguments).items() if k not in ("out", "data", "model")},
        "windows": {split: list(ids.shape) for split, ids in bench.texts.items()},
        "same text": same_text(arguments.data, ("train", "validation", "test"), arguments.model),
        "float": {"test": perplexity(base), "interval": interval(base, base, None)},
        "rows": [],
        "validation": {},  # format -> variant -> perplexity, divergence
    }
    made: dict[str, dict[str | None, dict[str, Any]]] = {text: {} for text in texts}
    began = time.perf_counter()
    for job, found in results(bench, jobs, arguments):
        found["loss"] = torch.as_tensor(found["loss"], dtype=torch.float64)
        made[job.format][job.variant] = found
        now = time.perf_counter() - began
        print(
            f"{now:5.0f} s  {job.format:18} {job.variant or 'rounding':60} {found['validation']:.4f} "
            f"{found['validation_divergence']:.5f}",
            flush=True,
        )
        done = done_formats(jobs, made)
        if job.format in done:
            record["rows"] = [row for text in done for row in rows(text, made[text], tried, base)]
            record["validation"] = {
                text: {
                    str(v): [one["validation"], one["validation_divergence"]] for v, one in made[text].items()
                }
                for text in done
            }
            if arguments.out:
                _write(Path(arguments.out), record)
    lost = [text for text in texts if text not in done_formats(jobs, made)]
    if lost:
        print(f"not in the table, since jobs of theirs did not end: {', '.join(lost)}", file=sys.stderr)
    return record


def done_formats(jobs: list[Job], made: dict[str, dict[str | None, dict[str, Any]]]) -> list[str]:
    """The formats of which every job has ended."""
    return [text for text in made if sum(job.format == text for job in jobs) == len(made[text])]


def rows(
    text: str, made: dict[str | None, dict[str, Any]], tried: dict[str, tuple[str, ...]], base: Tensor
) -> list[dict[str, Any]]:
    """The lines of one format: rounding, each algorithm's best variant by the validation text, the best of
    all."""
    plain = made[None]["loss"]
    shown: list[tuple[str, str | None]] = [("rounding", None)]
    for name, all in tried.items():
        shown.append((name, min(all, key=lambda variant: made[variant][JUDGE])))
    shown.append((BEST, min(filter(None, made), key=lambda variant: made[variant][JUDGE])))
    found = []
    for name, variant in shown:
        one = made[variant]
        loss = one["loss"]
        row = {key: one[key] for key in ("bits", "divergence", "seconds", "peak_mib")} | {
            "format": text,
            "algorithm": name,
            "variant": variant,
            "perplexity": perplexity(loss),
            "interval": interval(loss, base, None),
            "change": perplexity(loss) / perplexity(base) - 1,
        }
        if variant is not None:
            row |= {"won": won(loss, base, plain), "won_interval": interval(loss, base, plain)}
            row["won_divergence"] = 1 - one["divergence"] / made[None]["divergence"]
        found.append(row)
    return found


def _write(path: Path, record: dict[str, Any]) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def _peak_reset() -> int:
    """Bytes in use; peaks are counted from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the high-water mark starts anew
    return _resident("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def main() -> int:
    arguments = _arguments()
    arguments.format = arguments.format or list(FORMATS)
    record = measure(Bench(arguments), arguments)
    print(table(record))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(FOLDER))
    parser.add_argument("--data", default="out/lm")
    parser.add_argument("--out", help="a JSON file for the rows")
    parser.add_argument("--format", action="append", help="may be repeated (default: all of the table)")
    parser.add_argument("--algorithm", action="append", choices=ALGORITHMS, help="may be repeated")
    parser.add_argument("--first", action="store_true", help="only the first variant of each algorithm")
    parser.add_argument("--windows", type=int, default=0, help="of validation and test text; 0: all")
    parser.add_argument("--calibration", type=int, default=512, help="windows of the training text")
    parser.add_argument("--batch", type=int, default=8, help="windows of a calibration batch")
    parser.add_argument("--processes", type=int, default=1, help="how many share the device")
    parser.add_argument("--patience", type=float, default=240.0, help="seconds without a result to give up")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
