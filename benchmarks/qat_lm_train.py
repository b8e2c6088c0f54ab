"""One training of the small decoder, in floats or on rounded numbers, and how a model is judged.

In: the options of qat_lm.py. Out: losses, perplexities, and whether the converted model is the trained one.

    bench = Bench(given); trained(bf.prepare_qat(copy.deepcopy(bench.model), ..), bench, seed=0, rate=3e-4)
    ->  {"judged": {"validation": 26.1, "test": 28.3}, "equal": True, "curve": [..], ..}

Weights and optimizer are float32, products bfloat16 by autocast on a GPU. What is compiled is the layer, once
for all layers that are alike, and the loss. A model is judged in float32, on the reference target.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_llama import FOLDER, Size, SmallLlama, load
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
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
        ids = self.ids[split]
        count = len(ids) // self.length
        count = min(count, self.most) if self.most else count
        return ids[: count * self.length].view(count, self.length).long()

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
    """The file's model, its texts, and the options."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        model = SmallLlama(TINY).eval() if given.tiny else load(given.model or FOLDER)
        self.model = model.to(self.device)
        self.texts = Texts(given, model.size, self.device)


@torch.no_grad()
def judged(model: nn.Module, bench: Bench) -> dict[str, float]:
    """Perplexity of every token but the first of each window, in evaluation mode, float32, uncompiled."""
    model.eval()
    found = {}
    with torch.compiler.set_stance("force_eager"):
        for split in ("validation", "test"):
            windows = bench.texts.windows(split)
            losses = [loss_of(model(ids), ids).double() * len(ids) for ids in windows.split(16)]
            found[split] = math.exp(float(torch.stack(losses).sum()) / len(windows))
    return found


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of every token but the first."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def compile_layers(model: nn.Module) -> None:
    """Layers that are alike are compiled once."""
    layers: Any = model.get_submodule("model.layers")
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False)


def trained(
    model: nn.Module, bench: Bench, seed: int, rate: float, save: Path | None = None
) -> dict[str, Any]:
    """Train `model`, convert it if it is prepared, write it if `save` says where, and judge it."""
    began = time.perf_counter()
    try:
        curve, compiled = train(model, bench, seed, rate, bench.given.compile), bench.given.compile
    except TorchDynamoException as error:
        print(f"NOT COMPILED, {type(error).__name__}: {error}", flush=True)  # and the row says so
        torch._dynamo.reset()
        with torch.compiler.set_stance("force_eager"):
            curve, compiled = train(model, bench, seed, rate, False), False
    seconds = time.perf_counter() - began
    row: dict[str, Any] = {"rate": rate, "seconds": seconds, "compiled": compiled, "curve": curve}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        ids = bench.texts.windows("validation")[:4]
        model.eval()
        before = model(ids)
        if any(getattr(module, "is_prepared", False) for module in model.modules()):
            bf.convert(model, target="reference")
            if save is not None:
                save.parent.mkdir(parents=True, exist_ok=True)
                bf.save(model, save)
        row["equal"] = torch.equal(model(ids), before)
    return row | {"judged": judged(model, bench)}


def train(model: nn.Module, bench: Bench, seed: int, rate: float, compiled: bool) -> list[float]:
    """What each step's loss was."""
    given, cuda = bench.given, bench.device.type == "cuda"
    prepared = any(getattr(module, "is_prepared", False) for module in model.modules())
    task = given.task if prepared else 1.0  # a model of floats has nobody to learn from
    teacher = bench.model if prepared else None
    distill = bf.Distill()

    def loss_from(said: Tensor, wanted: Tensor | None, ids: Tensor) -> Tensor:
        loss = task * loss_of(said, ids) if task else said.new_zeros(())
        return loss if wanted is None else loss + distill.of(said, wanted)

    groups = bf.parameter_groups(model, rate, rate * given.scale_rate, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=cuda)
    warm = max(given.steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(step / given.steps, 1.0))),
    )
    if compiled:
        torch._dynamo.reset()
        compile_layers(model)
        loss_from = torch.compile(loss_from, dynamic=False)
        if teacher is not None:
            compile_layers(teacher)
    draw = torch.Generator(bench.device).manual_seed(seed)
    torch.manual_seed(seed)
    curve = []
    model.train()
    for _ in range(given.steps):
        ids = bench.texts.batch(draw, given.batch)
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            with torch.no_grad():
                wanted = None if teacher is None else teacher(ids)
            loss = loss_from(model(ids), wanted, ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append(loss.detach())
    return torch.stack(curve).tolist()  # type: ignore[no-any-return]
