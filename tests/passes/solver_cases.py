"""Layers for tests of solvers: inputs with a few strong directions, and the error that they make."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.passes import Pipeline
from bitfold.passes.algorithms.draft import Draft
from bitfold.passes.algorithms.inputs import Inputs
from bitfold.passes.algorithms.solve import Task

FORMATS = [
    "int4[g32]",
    "int3[g32]",
    "int4[row]",
    "int4[tensor]",
    "int8[16x32]",
    "uint4[g32,bf16,zero:int]",
    "tinygemm",
    "q4_1",
    "nf4[g64]",
    "mxfp4",
    "nvfp4",
    "float8_e4m3fn[row]",
    "ternary",
]


def correlated(k: int = 128, tokens: int = 2048, seed: int = 0) -> Tensor:
    """Activations with a few strong directions, as those of a language model have."""
    torch.manual_seed(seed)
    mix = torch.randn(k // 8, k)
    return torch.randn(tokens, k // 8) @ mix + 0.1 * torch.randn(tokens, k)


def task(text: str, rows: int = 32, k: int = 128, x: Tensor | None = None) -> Task:
    torch.manual_seed(1)
    inputs = Inputs(k)
    inputs.add(correlated(k) if x is None else x)
    return Task("fc", bf.format(text), Draft(torch.randn(rows, k)), inputs)


def error(one: Task, draft: Draft) -> float:
    assert one.inputs is not None
    return float(one.inputs.error(draft.rounded(one.format) - one.weight).sum())


def graph(text: str, layer: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    gm = bf.capture(layer, (x,))
    Pipeline.parse(f'annotate{{recipe="{text}"}}').run(gm)
    return gm
