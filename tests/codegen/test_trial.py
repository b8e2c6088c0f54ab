"""What a kernel's result is held against before its time counts: right results pass, wrong ones say why.

The launch is stood in for by products in float64 on the CPU; on a GPU the same tensors go to a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfold.codegen import GemmSpec
from bitfold.codegen.trial import BOUND, Trial, Weights
from bitfold.formats import Quantized

SPECS = [
    "linear 64x256 bf16 int4[g128,halves256]",
    "linear 64x256 bf16 int4[g128,halves256] bias",
    "linear 48x256 f16 nvfp4[halves64]",
    "linear 32x256 bf16 uint4[g128,zero,halves256]",
    "linear 32x256 bf16 2*int4[g128,halves256] -> mul(silu(y0),y1)",
    "linear 64x256 bf16 int8[bytes] x:int8[row,bytes]",
    "grouped 4 32x256 bf16 int4[g128,halves256]",
]
Launch = Callable[..., Tensor]


def exactly(spec: GemmSpec, inputs: Sequence[Tensor]) -> Tensor:
    """The result in float64, by the formats' own decoding."""
    given = spec.inputs(inputs)
    x = given.x.double()
    if spec.activation is not None:
        x = Quantized.from_parts(spec.activation, [given.x, given.x_scales], spec.k).dequantize(torch.float64)
    sums = {}
    for i, parts in enumerate(given.parts):
        w = Quantized.from_parts(spec.weight, parts, spec.k).dequantize(torch.float64)
        if given.ends is None:
            y = x @ w.T
        else:
            which = torch.bucketize(torch.arange(x.shape[0]), given.ends, right=True)
            y = torch.stack([row @ w[expert].T for row, expert in zip(x, which.tolist(), strict=True)])
        sums[f"y{i}"] = y + given.biases[i].double() if spec.bias else y
    return sums["y0"] if spec.epilogue.plain else spec.epilogue.run(sums)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, Launch], Trial]:
    def make(text: str, m: int, launch: Launch) -> Trial:
        monkeypatch.setattr("bitfold.codegen.triton.build.launch", launch)
        monkeypatch.setattr("bitfold.codegen.trial.copies_past_cache", lambda nbytes: 3)
        return Trial.of(Weights.of(GemmSpec.parse(text), "cpu"), m)

    return make


def right(spec: GemmSpec, schedule: Any, inputs: Sequence[Tensor], out: Tensor) -> Tensor:
    assert out.isnan().all(), "what was there before must not pass for a result"
    return out.clone().copy_(exactly(spec, inputs))


@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize("text", SPECS)
def test_a_right_result_passes(trial: Any, text: str, m: int) -> None:
    made = trial(text, m, right)
    calls = made.calls("m16 n64 w2 s3 k1 sum")
    error = made.error(calls)
    assert len(calls) == 3 and error < BOUND
    assert made.problem(error, calls) is None
    assert made.weights.nbytes == sum(part.nbytes for part in made.weights.copies[0])


def test_copies_are_other_memory(trial: Any) -> None:
    copies = trial(SPECS[0], 1, right).weights.copies
    assert len({part.data_ptr() for copy in copies for part in copy}) == sum(map(len, copies))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda y: y * 1.01, "error 0.01 is over 0.0039"),
        (lambda y: y.index_fill(0, torch.tensor([1]), 0.0), "is over"),
        (lambda y: y.index_fill(1, torch.tensor([5]), math.nan), "error nan is over"),
        (lambda y: y.index_fill(1, torch.tensor([5]), math.inf), "error inf is over"),
    ],
)
def test_a_wrong_result_does_not(trial: Any, wrong: Callable[[Tensor], Tensor], said: str) -> None:
    made = trial(SPECS[0], 4, lambda *given, **more: wrong(right(*given, **more)))
    calls = made.calls("m16 n64 w2 s3 k1 sum")
    assert said in (made.problem(made.error(calls), calls) or "")


def test_another_result_each_time_does_not(trial: Any) -> None:
    noisy: Launch = lambda *given, **more: right(*given, **more) * (1 + 1e-3 * torch.rand(()))  # noqa: E731
    made = trial("linear 64x256 f16 int4[g128,f16,halves256]", 4, noisy)
    calls = made.calls("m16 n64 w2 s3 k1 sum")
    assert made.problem(made.error(calls), calls) == "two runs differ"
