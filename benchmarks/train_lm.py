"""Train the small decoder of small_llama.py from nothing, in full precision, for ptq.py to quantize.

In: a folder with train.npy and validation.npy (corpus.py makes it). Out: model.safetensors (bfloat16),
config.json and training.json (curves, environment, seconds).

    python benchmarks/train_lm.py --data out/lm --out benchmarks/lm       on a GPU: three minutes
    python benchmarks/train_lm.py --data out/lm --out out/tiny --tiny     on a CPU: to try the script

Weights and optimizer are float32, products bfloat16 by autocast (on a GPU), AdamW with a warm-up and a
cosine. Runs of several lengths are made, from the same start; each remembers its best validation loss,
looked at every half epoch, and stops when that has not fallen for eight looks. The best of all is what is
written: the test text is not read here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from small_llama import Size, SmallLlama
from torch import Tensor
from torch.nn import functional as F

TINY = Size(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
PATIENCE = 8


@dataclass
class Run:
    """One training: what it was asked for, its curve, and the weights at its best."""

    epochs: int
    curve: list[tuple[int, float, float]] = field(default_factory=list)  # step, train loss, validation loss
    best: float = math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)

    def look(self, step: int, train: float, validation: float, model: SmallLlama) -> bool:
        """Note a look at the validation text; False when it is time to stop."""
        self.curve.append((step, train, validation))
        print(
            f"{self.epochs} epochs, step {step}: train {train:.4f}, validation {validation:.4f}", flush=True
        )
        if validation < self.best:
            self.best = validation
            self.weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
        since = len(self.curve) - 1 - min(range(len(self.curve)), key=lambda i: self.curve[i][2])
        return since < PATIENCE


class Trainer:
    """The data and the settings, which all runs share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.size = TINY if arguments.tiny else Size()
        self.length = self.size.max_position_embeddings
        self.batch = 16 if arguments.tiny else arguments.batch
        self.rate, self.decay, self.dropout = arguments.rate, arguments.decay, arguments.dropout
        self.train = self._ids(arguments.data, "train", 100_000 if arguments.tiny else None)
        held = self._ids(arguments.data, "validation", 20_000 if arguments.tiny else None)
        self.validation = held[: len(held) // self.length * self.length].view(-1, self.length)
        torch.manual_seed(0)
        self.model = SmallLlama(self.size, self.dropout).to(self.device).train()
        self.start = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        self.loss_of = torch.compile(self._loss) if self.device.type == "cuda" else self._loss
        self.deadline = time.monotonic() + arguments.seconds
        self.loss_of(self.model, self._batch()).backward()  # compiles, which no run shall pay for

    def _ids(self, folder: str, split: str, most: int | None) -> Tensor:
        ids = np.load(Path(folder) / f"{split}.npy")[:most].astype(np.int32)
        return torch.from_numpy(ids).to(self.device)

    def run(self, epochs: int, seed: int = 0) -> Run:
        """From the start again, for so many epochs; the seed decides data and dropout."""
        torch.manual_seed(seed)
        model = self.model
        model.load_state_dict(self.start)
        model.zero_grad()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": self.decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), fused=True)
        per_epoch = len(self.train) // (self.batch * self.length)
        steps, look = epochs * per_epoch, max(per_epoch // 2, 1)
        warm = min(200, steps // 10 + 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, warm, steps))
        run, recent = Run(epochs), torch.zeros((), device=self.device)
        for step in range(1, steps + 1):
            loss = self.loss_of(model, self._batch())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            recent += loss.detach()
            if step % look == 0 or step == steps:
                going = run.look(step, float(recent) / look, self.validate(model), model)
                recent.zero_()
                if not going or time.monotonic() > self.deadline:
                    break
        return run

    def _loss(self, model: SmallLlama, ids: Tensor) -> Tensor:
        on_gpu = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            logits = model(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten().long())

    def _batch(self) -> Tensor:
        starts = torch.randint(len(self.train) - self.length - 1, (self.batch, 1), device=self.device)
        return self.train[starts + torch.arange(self.length + 1, device=self.device)]

    def validate(self, model: SmallLlama) -> float:
        """Mean loss over all windows of the validation text, in eval mode."""
        model.eval()
        with torch.no_grad():
            parts = [self._loss(model, ids) * len(ids) for ids in self.validation.split(256)]
        model.train()
        return float(torch.stack(parts).sum()) / len(self.validation)


def main() -> int:
    arguments = _arguments()
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(arguments)
    began = time.monotonic()
    runs: list[Run] = []
    for epochs in map(int, arguments.epochs.split(",")):
        started = time.monotonic()
        if runs and started + (started - began) / sum(r.epochs for r in runs) * epochs > trainer.deadline:
            print(f"no time is left for {epochs} epochs", flush=True)
            continue
        runs.append(trainer.run(epochs))
    best = min(runs, key=lambda run: run.best)
    print(f"best: {best.epochs} epochs, validation {best.best:.4f}, {time.monotonic() - began:.0f} s")
    _write(Path(arguments.out), trainer, best, runs, time.monotonic() - began, vars(arguments))
    return 0


def _write(
    folder: Path, trainer: Trainer, best: Run, runs: list[Run], seconds: float, asked: dict[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.bfloat16().cpu().contiguous() for name, t in best.weights.items()}
    weights.pop("lm_head.weight")  # the embedding's
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {
        "where": {"device": where, "torch": torch.__version__},
        "asked": {name: value for name, value in asked.items() if name not in ("data", "out")},
        "seconds": round(seconds, 1),
        "validation_loss": best.best,
        "runs": [{"epochs": run.epochs, "best": run.best, "curve": run.curve} for run in runs],
    }
    save_file(weights, folder / "model.part", metadata={"format": "pt"})
    (folder / "model.part").replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(trainer.size.config(), indent=2) + "\n", encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _rate(step: int, warm: int, steps: int) -> float:
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="out/lm")
    parser.add_argument("--out", default="benchmarks/lm")
    parser.add_argument(
        "--epochs", default="16,30,8", help="lengths to try, in this order while time is left"
    )
    parser.add_argument(
        "--seconds", type=float, default=140, help="no run goes on for longer than this in all"
    )
    parser.add_argument("--batch", type=int, default=64, help="windows of 256 tokens a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument(
        "--tiny", action="store_true", help="two layers on a piece of the text, to try the script"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
