"""A training step of the small decoder that is launched as one: a CUDA graph of forward, backward and AdamW.

In: a model, in floats or prepared, and the model that it learns from, if any. Out: the curve of a training.

    steps = Steps(model, teacher, bench); steps.run(seed=0, rate=1e-4, steps=1000)   ->  [0.031, 0.030, ..]

A decoder this small leaves a card waiting for Python: hundreds of kernels of a few microseconds a step.
What is compiled is the layer, once for all that are alike, and the loss; what is captured is all of the
step. Each `run` starts at the weights that the model had when the steps were made, with a fresh optimizer,
so that rates and seeds share what was compiled and captured. On a CPU the step is run as it is.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf

if TYPE_CHECKING:
    from qat_lm_train import Bench

WARM = 3
"""Steps before a capture: kernels are loaded and the optimizer's state is made in them."""


class Steps:
    """`compiled`, `captured`: what was done, or why it could not be."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, bench: Bench) -> None:
        self.model, self.teacher, self.bench = model.train(), teacher, bench
        self.distill = bf.Distill()
        self.cuda = bench.device.type == "cuda"
        self.begin = copy.deepcopy(model.state_dict())
        self.shares = (1.0, bench.given.scale_rate)  # rates of weights and of learned scales, of the rate
        groups = bf.parameter_groups(model, 0.0, 0.0, weight_decay=0.0)
        for group in groups:
            group["lr"] = torch.zeros((), device=bench.device)  # what a captured step reads
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=self.cuda, capturable=self.cuda)
        self.ids = bench.texts.batch(torch.Generator(bench.device).manual_seed(0), bench.given.batch)
        self.task = torch.zeros((), device=bench.device)  # the share of the text's own loss
        self.loss_of, self.compiled, self.captured = self._loss, "no", "no"
        self.graph: torch.cuda.CUDAGraph | None = None
        if bench.given.compile:
            self._compile()
        if self.cuda and bench.given.capture:
            self._capture()

    def run(self, seed: int, rate: float, steps: int, task: float = 0.0) -> list[float]:
        """Each step's loss; the model is what it has become. task: the share of the text's own loss, where
        there is somebody to learn from."""
        self._reset()
        self.task.fill_(task)
        draw = torch.Generator(self.bench.device).manual_seed(seed)
        warm, curve = max(steps // 20, 1), []
        for step in range(steps):
            way = min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group, share in zip(self.optimizer.param_groups, self.shares, strict=False):
                group["lr"].fill_(rate * share * way)
            self.ids.copy_(self.bench.texts.batch(draw, self.bench.given.batch))
            if self.graph is None:
                curve.append(self.step())
            else:
                self.graph.replay()
                curve.append(self.loss.clone())
        return torch.stack(curve).tolist()  # type: ignore[no-any-return]

    def step(self) -> Tensor:
        """One step on `ids`; its loss."""
        self.optimizer.zero_grad()
        # Without a cache of casts: a captured step shall hold its own.
        with torch.autocast("cuda", torch.bfloat16, enabled=self.cuda, cache_enabled=False):
            with torch.no_grad():
                wanted = None if self.teacher is None else self.teacher(self.ids)
            loss = self.loss_of(self.model(self.ids), wanted, self.ids, self.task)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def _loss(self, said: Tensor, wanted: Tensor | None, ids: Tensor, task: Tensor) -> Tensor:
        """The text's own loss where there is nobody to learn from; else the distance from the teacher."""
        if wanted is None:
            return loss_of(said, ids)
        return (1.0 - task) * self.distill.of(said, wanted) + task * loss_of(said, ids)

    def _reset(self) -> None:
        with torch.no_grad():
            for name, held in self.model.state_dict().items():
                held.copy_(self.begin[name])
            for state in self.optimizer.state.values():
                for held in state.values():
                    held.zero_()

    def _compile(self) -> None:
        torch._dynamo.reset()  # of an earlier task in this process
        compile_layers(self.model)
        if self.teacher is not None:
            compile_layers(self.teacher)
        self.loss_of = torch.compile(self._loss, dynamic=False)
        self.compiled = "yes"
        try:
            self.step()
        except Exception as error:  # and the row says so
            self.compiled = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print("NOT COMPILED,", self.compiled, flush=True)
            torch._dynamo.reset()
            for model in (self.model, self.teacher):
                for module in () if model is None else model.modules():
                    module._compiled_call_impl = None
            self.loss_of = self._loss

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.loss = self.step()
        except Exception as error:  # and the row says so
            self.captured = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print("NOT CAPTURED,", self.captured, flush=True)
            torch.cuda.synchronize()
            return
        self.graph, self.captured = graph, "yes"


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of every token but the first."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def compile_layers(model: nn.Module) -> None:
    """Layers that are alike are compiled once."""
    layers: Any = model.get_submodule("model.layers")
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False)
