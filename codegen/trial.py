"""One spec on a GPU, ready to be tried: its tensors, what the result must be, and calls of any schedule.

In: a spec, rows of x. Out: a `Trial`.

    trial = Trial.of(spec, 16)
    trial.problem("m16 n64 w2 s3 k4 sum")     ->   None, or why its time would be worth nothing
    microseconds(trial.calls("library"))      ->   of decoding and the library's product, every time

The reference is a product in float32 with the decoded weight. Outputs hold NaN before a call, and two calls
must agree to the last bit. Weights are as many copies as do not fit the L2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..formats import Quantized
from .library import product
from .pipelined import parsed
from .spec import GemmSpec
from .table import LIBRARY
from .timing import copies_past_cache

# The result is rounded to bfloat16 (2^-9 of each value) and so may each decoded weight be; sums are float32.
# An epilogue of several sums has the error of each.
BOUND = 2.0**-8
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Weights:
    """Of one spec: the inputs after x and its scales, several times over, and each weight decoded."""

    spec: GemmSpec
    copies: tuple[tuple[Tensor, ...], ...]
    decoded: tuple[Tensor, ...]

    @classmethod
    def of(cls, spec: GemmSpec, device: str = "cuda") -> Weights:
        shape = (spec.experts, spec.n, spec.k) if spec.experts else (spec.n, spec.k)
        made = [spec.weight.quantize(torch.randn(shape, device=device) * 0.05) for _ in range(spec.weights)]
        biases = [
            torch.randn(spec.n, device=device, dtype=spec.dtype) for _ in range(spec.weights * spec.bias)
        ]
        one = [part for q in made for part in q.parts] + biases
        nbytes = sum(part.nbytes for part in one)
        copies = [tuple(one)]
        copies += [tuple(part.clone() for part in one) for _ in range(copies_past_cache(nbytes) - 1)]
        decoded = tuple(
            spec.weight.dequantize(Quantized.from_parts(spec.weight, q.parts, spec.k)).to(spec.dtype).float()
            for q in made
        )
        return cls(spec, tuple(copies), decoded)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.copies[0])


@dataclass(frozen=True)
class Trial:
    """first: x and, where it comes quantized, its scales; the last rows of the experts. last: what the
    epilogue reads. reference: the result in float32."""

    weights: Weights
    first: tuple[Tensor, ...]
    last: tuple[Tensor, ...]
    reference: Tensor

    @classmethod
    def of(cls, weights: Weights, m: int) -> Trial:
        spec = weights.spec
        device = weights.decoded[0].device
        x = torch.randn(m, spec.k, device=device).to(spec.dtype)
        first, exact = [x], x.float()
        if spec.activation is not None:
            q = spec.activation.quantize(exact)
            first, exact = list(q.parts), spec.activation.dequantize(q).float()
        if spec.experts:
            ends = (torch.arange(1, spec.experts + 1, device=device) * m) // spec.experts
            first.append(ends.to(torch.int32))
        matrices, vectors = spec.epilogue.count("e"), spec.epilogue.count("v")
        last = [torch.randn(m, spec.n, device=device, dtype=spec.dtype) for _ in range(matrices)]
        last += [torch.randn(spec.n, device=device, dtype=spec.dtype) for _ in range(vectors)]
        inputs = [*first, *weights.copies[0], *last]
        return cls(weights, tuple(first), tuple(last), reference(spec, inputs, exact, weights.decoded))

    def calls(self, schedule: str) -> list[Call]:
        """One a copy of the weights, into the same memory, NaN before."""
        from .triton.run import run

        spec, m = self.weights.spec, self.first[0].shape[0]
        if schedule == LIBRARY:
            x, count = self.first[0], len(spec.weight.parts)
            scales = None if spec.activation is None else self.first[1]

            def by_library(copy: tuple[Tensor, ...]) -> Tensor:
                return product(spec, x, scales, copy[:count], copy[count] if spec.bias else None)

            return [partial(by_library, copy) for copy in self.weights.copies]
        y = torch.full((m, spec.n), float("nan"), device=self.reference.device).to(spec.out)
        inputs = [[*self.first, *copy, *self.last] for copy in self.weights.copies]
        return [partial(run, spec, parsed(schedule), one, out=y) for one in inputs]

    def error(self, calls: Sequence[Call]) -> float:
        """Norm of the difference from the reference, over the reference's; NaN if a result is."""
        y = calls[0]().float()
        return float((y - self.reference).norm() / self.reference.norm())

    def problem(self, error: float, calls: Sequence[Call]) -> str | None:
        """Why a time of these calls would be worth nothing: a wrong result, or another one each run."""
        bound = BOUND * self.weights.spec.weights
        if not error <= bound:
            return f"error {error:.2g} is over {bound:.2g}"
        first = calls[0]().clone()
        return None if torch.equal(first, calls[0]()) else "two runs differ"


def reference(spec: GemmSpec, inputs: Sequence[Tensor], x: Tensor, decoded: Sequence[Tensor]) -> Tensor:
    """[M, n] in float32: x [M, k] times each decoded weight, transposed; biases and the epilogue."""
    given = spec.inputs(inputs)
    sums = [_product(x, weight, given.ends) for weight in decoded]
    sums = [y + given.biases[i].float() if spec.bias else y for i, y in enumerate(sums)]
    if spec.epilogue.plain:
        return sums[0]
    named = {f"y{i}": y for i, y in enumerate(sums)}
    matrices = spec.epilogue.count("e")
    named |= {f"e{i}": extra.float() for i, extra in enumerate(given.extras[:matrices])}
    named |= {f"v{i}": extra.float() for i, extra in enumerate(given.extras[matrices:])}
    return spec.epilogue.run(named).float()


def _product(x: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
    if ends is None:
        return x @ weight.T
    starts = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ w.T for a, b, w in zip(starts, starts[1:], weight, strict=False)])
