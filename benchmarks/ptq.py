"""Post-training quantization on the small decoder: what each algorithm wins back of what rounding loses.

In: the committed model, and token ids (corpus.py). Out: a JSON file, and the table of it: for every algorithm
and format the perplexity of the test text with a bootstrap interval, the divergence from the float model's
predictions, bits a weight with scales counted,
minutes, peak memory, and the share of rounding's loss that is won back.

    python benchmarks/ptq.py --out benchmarks/results/ptq-cpu.json
    python benchmarks/ptq.py --windows 16 --calibration 8 --format "int4[g64]"       to try the script

An algorithm has a few variants (its settings); the variant is chosen by the perplexity of the validation
text, format by format, and that one alone is run on the test text (--first takes the first one unseen).
`best` chooses among all variants of all algorithms. Calibration data are windows of the training text.
Everything is computed in float32 on the reference target, from the bfloat16 weights of the file: what is
measured is the rounding.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ptq_table import table
from small_llama import FOLDER, SmallLlama, load
from torch import Tensor

import bitfold as bf
from bitfold.passes.recipes import Recipe
from bitfold.passes.rules import Rule
from bitfold.tools.demo import environment

FORMATS = (
    *("int4[g128]", "int4[g64]", "int4[g32]", "int3[g32]", "mxfp4", "nvfp4"),
    *("int8_dynamic", "fp8_dynamic", "int4[g64] x int8"),
)
# The first variant of each is what is run with --first.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "clip": ("clip", "clip{weighted=false}", "clip{norm=2.4}"),
    "hqq": ("hqq",),
    "awq": ("awq,clip", "awq", "awq{clip=true},clip"),
    "smooth": ("smooth", "smooth{alpha=0.3}", "smooth{alpha=0.7}"),
    "gptq": ("gptq", "gptq{actorder=false,groups=sequential}", "gptq{damping=0.05}"),
    "gptq, tuned": ("clip,gptq,descend,refit", "clip,gptq", "clip,gptq,refit,gptq,descend,refit"),
    "learned": ("clip,gptq,learn", "clip,gptq,descend,refit,learn{steps=400}", "clip,learn{steps=400}"),
    "awq + gptq": ("awq,clip,gptq,descend,refit", "awq{clip=true},clip,gptq,descend,refit"),
}
BEST = "best"


class Bench:
    """The model, its texts, and what has been measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load(arguments.model).to(self.device)
        self.length = self.model.size.max_position_embeddings
        self.texts = {
            split: self._windows(arguments.data, split, arguments.windows) for split in ("validation", "test")
        }
        calibration = self._windows(arguments.data, "train", arguments.calibration)
        self.batches = [(piece,) for piece in calibration.split(4)]
        self.float_loss = self.losses(self.model, "test")[0]

    def _windows(self, folder: str, split: str, count: int) -> Tensor:
        """`count` windows spread over the split (all if 0), the same ones each time."""
        ids = np.load(Path(folder) / f"{split}.npy").astype(np.int64)
        windows = ids[: len(ids) // self.length * self.length].reshape(-1, self.length)
        order = np.random.default_rng(0).permutation(len(windows))
        chosen = order[: count or len(order)]
        return torch.from_numpy(windows[np.sort(chosen)]).to(self.device)

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

    def row(
        self,
        text: str,
        name: str,
        made: tuple[SmallLlama, float, int],
        algorithm: str | None,
        rounding: Tensor | None,
    ) -> dict[str, Any]:
        """One line of the table. `made`: as `quantized` returns it."""
        model, seconds, memory = made
        loss, apart = self.losses(model, "test")
        base = self.float_loss
        row = {
            "format": text,
            "algorithm": name,
            "variant": algorithm,
            "bits": bits(self.model, text),
            "perplexity": perplexity(loss),
            "interval": interval(loss, base, None),
            "change": perplexity(loss) / perplexity(base) - 1,
            "divergence": float(apart.mean()),
            "seconds": round(seconds, 1),
            "peak_mib": round(memory / 2**20, 1),
        }
        if rounding is not None:
            row["won"] = won(loss, base, rounding)
            row["won_interval"] = interval(loss, base, rounding)
        return row | {"loss": loss}


def perplexity(loss: Tensor) -> float:
    return math.exp(float(loss.mean()))


def won(loss: Tensor, base: Tensor, rounding: Tensor) -> float:
    """Share of what rounding adds to the perplexity that is not added."""
    lost = perplexity(rounding) - perplexity(base)
    return 1 - (perplexity(loss) - perplexity(base)) / lost if lost else math.nan


def interval(loss: Tensor, base: Tensor, rounding: Tensor | None, draws: int = 1000) -> tuple[float, float]:
    """95 % of bootstrap draws of windows, in pairs: of the perplexity, or of the share that is won."""
    draw = np.random.default_rng(0).integers(0, len(loss), (draws, len(loss)))
    means = [np.exp(part.numpy()[draw].mean(1)) for part in (loss, base)]
    found = means[0]
    if rounding is not None:
        plain = np.exp(rounding.numpy()[draw].mean(1))
        found = 1 - (means[0] - means[1]) / (plain - means[1])
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


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


def measure(bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, written after each format, so that an interrupted run has what it had."""
    float_test = bench.float_loss
    record: dict[str, Any] = {
        "where": environment(bench.device),
        "asked": {k: v for k, v in vars(arguments).items() if k not in ("out", "data", "model")},
        "windows": {split: list(ids.shape) for split, ids in bench.texts.items()},
        "float": {
            "test": perplexity(float_test),
            "interval": interval(float_test, float_test, None),
        },
        "rows": [],
        "validation": {},
    }
    for text in arguments.format or FORMATS:
        rounding = bench.row(text, "rounding", bench.quantized(text, None), None, None)
        rows, seen = [rounding], {}
        for name in arguments.algorithm or ALGORITHMS:
            variants = ALGORITHMS[name][:1] if arguments.first else ALGORITHMS[name]
            best = None
            for variant in variants:
                made = bench.quantized(text, variant)
                if not arguments.first:
                    seen[variant] = perplexity(bench.losses(made[0], "validation")[0])
                    print(f"{text:18} {variant:45} validation {seen[variant]:.4f}", flush=True)
                if best is None or seen[variant] < seen[best[1]]:
                    best = made, variant
            assert best is not None
            rows.append(bench.row(text, name, *best, rounding["loss"]))
            print(f"{text:18} {best[1]:45} test {rows[-1]['perplexity']:.4f}", flush=True)
        if seen:
            chosen = min(seen, key=seen.__getitem__)
            rows.append(next(row for row in rows if row["variant"] == chosen) | {"algorithm": BEST})
        record["validation"][text] = seen
        record["rows"] += [{key: value for key, value in row.items() if key != "loss"} for row in rows]
        if arguments.out:
            _write(Path(arguments.out), record)
    return record


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
    parser.add_argument("--calibration", type=int, default=128, help="windows of the training text")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
