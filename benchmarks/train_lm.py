"""Train the small decoder of small_llama.py from nothing, in full precision, for ptq.py to quantize.

In: a folder with train.npy and validation.npy (corpus.py makes it). Out: model.safetensors (bfloat16),
config.json and training.json (curves of all candidates, environment, seconds).

    python benchmarks/train_lm.py --data out/lm --seconds 190             on a GPU: all candidates
    python benchmarks/train_lm.py --data out/lm --out out/one --candidate 256x8x768,dropout=0.1,decay=0.1
    python benchmarks/train_lm.py --data out/lm --out out/tiny --tiny     on a CPU: to try the script

A candidate is a size (width x layers x MLP), a dropout and a weight decay. Each is a process of its own, so
that several share a card that one alone does not fill. The one with the least loss on the validation text is
kept, whatever its size: nothing else decides, and the test text is not read here.

Weights and optimizer are float32, products bfloat16 by autocast (on a GPU), AdamW with a warm-up and a
cosine that ends after --epochs or at --seconds, whichever comes first. Each run remembers its best validation
loss, looked at twenty times, and stops when that has not fallen for six looks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from small_llama import Size, SmallLlama
from torch import Tensor
from torch.nn import functional as F

CANDIDATES = (
    "256x8x768,dropout=0.1,decay=0.1",
    "384x8x1024,dropout=0.1,decay=0.1",
    "384x8x1024,dropout=0.2,decay=0.3",
    "512x6x1024,dropout=0.2,decay=0.3",
)
TINY = "128x2x256,dropout=0.1,decay=0.1"
HEAD = 64
PATIENCE, LOOKS = 6, 20
FILES = ("model.safetensors", "config.json", "training.json")


@dataclass(frozen=True)
class Candidate:
    """What may be chosen by the validation loss."""

    text: str
    size: Size
    dropout: float
    decay: float

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """`256x8x768,dropout=0.1,decay=0.1`; heads are 64 wide, two of queries or more for one of keys."""
        sizes, *options = text.split(",")
        width, layers, inner = map(int, sizes.split("x"))
        heads = width // HEAD
        size = Size(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=2 if heads % 2 == 0 else 1,
        )
        given = dict(option.split("=") for option in options)
        return cls(text, size, float(given["dropout"]), float(given["decay"]))


@dataclass
class Run:
    """One training: its curve, and the weights at its best."""

    curve: list[tuple[int, float, float]] = field(default_factory=list)  # step, train loss, validation loss
    best: float = math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)

    def look(self, step: int, train: float, validation: float, model: SmallLlama) -> bool:
        """Note a look at the validation text; False when it is time to stop."""
        self.curve.append((step, train, validation))
        if validation < self.best:
            self.best = validation
            self.weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
        since = len(self.curve) - 1 - min(range(len(self.curve)), key=lambda i: self.curve[i][2])
        return since < PATIENCE


class Trainer:
    """One candidate with its data and settings."""

    def __init__(self, candidate: Candidate, arguments: argparse.Namespace) -> None:
        self.began = time.monotonic()
        self.seconds, self.epochs = arguments.seconds, arguments.epochs
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.candidate, self.length = candidate, candidate.size.max_position_embeddings
        self.batch, self.rate = arguments.batch, arguments.rate
        self.train = self._ids(arguments.data, "train", 100_000 if arguments.tiny else None)
        held = self._ids(arguments.data, "validation", 20_000 if arguments.tiny else None)
        self.validation = held[: len(held) // self.length * self.length].view(-1, self.length)
        torch.manual_seed(0)
        self.model = SmallLlama(candidate.size, candidate.dropout).to(self.device).train()
        self.loss_of = torch.compile(self._loss) if self.device.type == "cuda" else self._loss
        self.loss_of(self.model, self._batch()).backward()  # compiles, which the schedule shall not count
        self.model.zero_grad()
        self.started = time.monotonic()

    def _ids(self, folder: str, split: str, most: int | None) -> Tensor:
        ids = np.load(Path(folder) / f"{split}.npy")[:most].astype(np.int32)
        return torch.from_numpy(ids).to(self.device)

    def run(self) -> Run:
        """Train until the epochs, the seconds or the patience are used up."""
        model = self.model
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": self.candidate.decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), fused=True)
        steps = max(self.epochs * len(self.train) // (self.batch * self.length), 1)
        run, recent, since, looks = Run(), torch.zeros((), device=self.device), 0, 0
        step, done = 0, 0.0
        while done < 1:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * _share(done, step)
            loss = self.loss_of(model, self._batch())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent += loss.detach()
            step, since = step + 1, since + 1
            done = self._done(step, steps)
            if done * LOOKS >= looks + 1 or done >= 1:
                looks = int(done * LOOKS)
                train, validation = float(recent) / since, self.validate()
                going = run.look(step, train, validation, model)
                print(f"{self.candidate.text}, {step}: {train:.4f}, validation {validation:.4f}", flush=True)
                recent.zero_()
                since = 0
                if not going:
                    break
        return run

    def _done(self, step: int, steps: int) -> float:
        """How far training is: by steps, or by the time that is left for them."""
        if step % 16 == 0 and self.device.type == "cuda":
            torch.cuda.synchronize()  # the clock shall be the device's
        now = time.monotonic()
        budget = max(self.seconds - (self.started - self.began), 1.0)
        return max(step / steps, (now - self.started) / budget)

    def _loss(self, model: SmallLlama, ids: Tensor) -> Tensor:
        on_gpu = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            logits = model(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten().long())

    def _batch(self) -> Tensor:
        starts = torch.randint(len(self.train) - self.length - 1, (self.batch, 1), device=self.device)
        return self.train[starts + torch.arange(self.length + 1, device=self.device)]

    def validate(self) -> float:
        """Mean loss over all windows of the validation text, in eval mode."""
        self.model.eval()
        with torch.no_grad():
            parts = [self._loss(self.model, ids) * len(ids) for ids in self.validation.split(256)]
        self.model.train()
        return float(torch.stack(parts).sum()) / len(self.validation)


def main() -> int:
    arguments = _arguments()
    torch.set_float32_matmul_precision("high")
    given = arguments.candidate or ([TINY] if arguments.tiny else list(CANDIDATES))
    if len(given) == 1:
        trainer = Trainer(Candidate.parse(given[0]), arguments)
        _write(Path(arguments.out), trainer, trainer.run(), arguments)
        return 0
    return _side_by_side(given, arguments)


def _side_by_side(given: list[str], arguments: argparse.Namespace) -> int:
    """A process for each candidate; the best one's files are kept, and the curves of all."""
    out = Path(arguments.out)
    folders = [out / f"candidate-{place}" for place in range(len(given))]
    mine = [word for word in sys.argv[1:] if word != "--tiny"] + ["--tiny"] * arguments.tiny
    common = [sys.executable, __file__, *_without(mine, ("--candidate", "--out"))]
    running = [
        subprocess.Popen([*common, "--candidate", text, "--out", str(folder)])
        for text, folder in zip(given, folders, strict=True)
    ]
    failed = [text for text, process in zip(given, running, strict=True) if process.wait() != 0]
    records = [
        json.loads((folder / "training.json").read_text(encoding="utf-8"))
        for text, folder in zip(given, folders, strict=True)
        if text not in failed
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    if not records:
        return 1
    best = min(records, key=lambda record: record["validation_loss"])
    chosen = folders[given.index(best["candidate"])]
    for name in FILES[:2]:
        (chosen / name).replace(out / name)
    best = best | {"runs": [run for record in records for run in record["runs"]], "failed": failed}
    (out / "training.json").write_text(json.dumps(best, indent=1) + "\n", encoding="utf-8")
    for folder in folders:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir():
            folder.rmdir()
    print(f"best: {best['candidate']}, validation {best['validation_loss']:.4f}")
    return 0


def _without(words: list[str], options: tuple[str, ...]) -> list[str]:
    """The words of a command line without these options and what follows each."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in options:
            skip = True
        else:
            kept.append(word)
    return kept


def _write(folder: Path, trainer: Trainer, run: Run, arguments: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.bfloat16().cpu().contiguous() for name, t in run.weights.items()}
    weights.pop("lm_head.weight")  # the embedding's
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    candidate, asked = trainer.candidate, ("epochs", "seconds", "batch", "rate", "tiny")
    record = {
        "where": {"device": where, "torch": torch.__version__},
        "asked": {name: getattr(arguments, name) for name in asked},
        "candidate": candidate.text,
        "size": asdict(candidate.size),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seconds": round(time.monotonic() - trainer.began, 1),
        "validation_loss": run.best,
        "runs": [{"candidate": candidate.text, "best": run.best, "curve": run.curve}],
    }
    save_file(weights, folder / "model.part", metadata={"format": "pt"})
    (folder / "model.part").replace(folder / "model.safetensors")
    config = json.dumps(candidate.size.config(), indent=2) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _share(done: float, step: int, warm: int = 200) -> float:
    """Of the highest rate: a warm-up in steps, a cosine in what is done."""
    return min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="out/lm")
    parser.add_argument("--out", default="benchmarks/lm")
    parser.add_argument("--candidate", action="append", help=f"may be repeated (default: {CANDIDATES})")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the text at most")
    parser.add_argument("--seconds", type=float, default=190, help="of each process, compiling included")
    parser.add_argument("--batch", type=int, default=64, help="windows of 256 tokens a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument(
        "--tiny", action="store_true", help="a small size on a piece of the text, to try the script"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
