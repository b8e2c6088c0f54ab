"""The texts and the float model of training the small decoder on rounded numbers, and how a model is judged.

In: the options of qat_lm.py. Out: perplexities, and whether the converted model is the trained one.

    bench = Bench(given); judged(model, bench)   ->   {"validation": 26.1, "test": 28.3, "divergence": 0.004}

Weights and optimizer are float32, products bfloat16 by autocast on a GPU (`qat_lm_step.py`). A model is
judged in float32, on the reference target, uncompiled.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from typing import Any

import numpy as np
import torch
from qat_lm_step import Steps, loss_of
from safetensors.torch import load_file
from small_llama import FOLDER, Size, SmallLlama, load
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf

TINY = Size(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
)


PIECE = 64
"""Windows at a time when a model is judged."""


class Texts:
    """Token ids: random windows to train on, all windows (or some) to judge by."""

    def __init__(self, given: argparse.Namespace, size: Size, device: torch.device) -> None:
        self.length, self.device = size.max_position_embeddings, device
        draw = np.random.default_rng(0)
        self.ids: dict[str, Tensor] = {}
        for split in ("train", "validation", "test"):
            if given.tiny:
                ids = draw.integers(0, size.vocab_size, 4096 if split == "train" else 1024)
            else:
                ids = np.load(given.data / f"{split}.npy")
            self.ids[split] = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.most = given.windows

    def windows(self, split: str) -> Tensor:
        """int64 [count, length], the same ones for every model."""
        count = self.count(split)
        return self.ids[split][: count * self.length].view(count, self.length).long()

    def count(self, split: str) -> int:
        """How many windows a text has to judge by."""
        count = len(self.ids[split]) // self.length
        return min(count, self.most) if self.most else count

    def calibration(self, count: int) -> Tensor:
        """`count` windows spread over the training text."""
        ids = self.ids["train"]
        windows = ids[: len(ids) // self.length * self.length].view(-1, self.length)
        order = np.sort(np.random.default_rng(0).permutation(len(windows))[:count])
        return windows[torch.from_numpy(order).to(self.device)].long()

    def batch(self, draw: torch.Generator, size: int) -> Tensor:
        """int64 [size, length], anywhere in the training text."""
        ids = self.ids["train"]
        starts = torch.randint(len(ids) - self.length, (size, 1), generator=draw, device=self.device)
        return ids[starts + torch.arange(self.length, device=self.device)].long()


class Bench:
    """The float model that everything begins with, its texts, and the options."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        model = SmallLlama(TINY).eval() if given.tiny else load(given.model or FOLDER)
        if given.base.exists():
            model.load_state_dict(load_file(given.base), strict=False)
            model.lm_head.weight = model.model.embed_tokens.weight
        self.model = model.to(self.device)
        self.texts = Texts(given, model.size, self.device)

    def floats(self) -> SmallLlama:
        """A copy to train or to quantize."""
        return copy.deepcopy(self.model)


@torch.no_grad()
def judged(model: nn.Module, bench: Bench) -> dict[str, float]:
    """Perplexity of every token but the first of each window, and how far a model is from the float one, the
    mean Kullback-Leibler divergence in nats over some windows of the validation text."""
    model, floats = copy.deepcopy(model).eval(), bench.floats().eval()
    found = {}
    for split in ("validation", "test"):
        windows = bench.texts.windows(split)
        losses = [loss_of(model(ids), ids).double() * len(ids) for ids in windows.split(PIECE)]
        found[split] = math.exp(float(torch.stack(losses).sum()) / len(windows))
    some = bench.texts.windows("validation")[:: max(bench.texts.count("validation") // 256, 1)]
    parts = []
    for ids in some.split(PIECE):
        said, wanted = (F.log_softmax(one(ids), -1).flatten(0, 1) for one in (model, floats))
        parts.append(F.kl_div(said, wanted, reduction="sum", log_target=True).double())
    found["divergence"] = float(torch.stack(parts).sum()) / some.numel()
    return found


def trained(
    steps: Steps, bench: Bench, seed: int, rate: float, count: int, task: float = 0.0
) -> dict[str, Any]:
    """Train, convert a copy if it is prepared, and judge that; `model` is it."""
    began = time.perf_counter()
    curve = [float(f"{loss:.5g}") for loss in steps.run(seed, rate, count, task)]
    row: dict[str, Any] = {"seed": seed, "rate": rate, "task": task, "curve": curve}
    row["seconds"] = time.perf_counter() - began
    model = copy.deepcopy(steps.model).eval()
    with torch.no_grad():
        ids = bench.texts.windows("validation")[:4]
        before = model(ids)
        if any(getattr(module, "is_prepared", False) for module in model.modules()):
            bf.convert(model, target="reference")
        row["equal"] = torch.equal(model(ids), before)
    return row | {"judged": judged(model, bench), "model": model}
