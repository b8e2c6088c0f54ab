"""Inductor is told which inputs of a rewritten graph stay where they are: CUDA graphs copy all others.

x, pos, fc.weight's codes, norm.weight, a cache   ->   static: all but x and pos
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf


class Cached(nn.Module):
    """A layer whose result goes into a buffer, as new tokens go into a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.RMSNorm(64), nn.Linear(64, 64)
        self.register_buffer("cache", torch.zeros(4, 64))

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        self.cache[pos] = self.fc(self.norm(x))
        return self.cache.sum(0) + x


class Stopped(Exception):
    pass


@pytest.mark.parametrize("ahead", [False, True], ids=["by the backend", "quantized ahead"])
def test_all_but_the_call_s_own_inputs_are_static(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """What torch tells Inductor of the model unquantized, with codes in the place of the weight."""
    from torch._inductor import compile_fx

    seen: list[tuple[int, int]] = []

    def spy(gm: Any, inputs: Any, **options: Any) -> Any:
        seen.append((len(inputs), len(inputs) - len(options["static_input_idxs"])))
        raise Stopped

    monkeypatch.setattr(compile_fx, "compile_fx_inner", spy)
    model = Cached().eval()
    if ahead:
        bf.quantize(model, "int8", target="reference")
    options = {"recipe": "int8", "target": "cpu"}
    with torch.inference_mode(), pytest.raises(Exception, match="Stopped"):
        torch.compile(model, backend="bitfold", options=options)(torch.randn(1, 64), torch.tensor([1]))
    torch.compiler.reset()
    ((count, moving),) = seen
    assert count >= 7 and moving == 2


def test_the_graph_still_runs_and_writes() -> None:
    torch.manual_seed(0)
    model, x = Cached().eval(), torch.randn(1, 64)
    fast = torch.compile(model, backend="bitfold", options={"recipe": "int8", "mode": "reduce-overhead"})
    eager = torch.compile(copy.deepcopy(model), backend="bitfold", options={"target": "reference"})
    with torch.inference_mode():
        for place in (1, 3):
            y, want_y = fast(x, torch.tensor([place])), eager(x, torch.tensor([place]))
            torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-5)
    assert (model.cache.abs().sum(1) > 0).tolist() == [False, True, False, True]
    torch.compiler.reset()


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("dim", [1, 2])
def test_one_image_without_a_batch(dim: int, target: str) -> None:
    """[C, H, W] is one image, which a kernel for [images, channels, width] must not take for that."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential((nn.Conv1d if dim == 1 else nn.Conv2d)(8, 8, 3, padding=1))
    x = torch.randn(8, *(8,) * dim)
    bf.quantize(model, "int8_static", target=target, calibration=[(x,)])
    with torch.inference_mode():
        assert torch.equal(model(x), model(x[None])[0])
