"""An orthogonal transform of the last dimension whose every entry is about as large as any other.

In: x [..., K]. Out: x M, M [K, K] orthogonal: a value that stands out in one channel is spread over all.

    [8 0 0 0]  ->  [4 4 4 4]

K = m * 2^k, and M is the product of a small core [m, m] and the Walsh-Hadamard matrix of order 2^k, which
takes k additions a number. The core is a Hadamard matrix of Paley's (m - 1 a prime that is 3 modulo 4, or
m / 2 - 1 one that is 1 modulo 4: 12, 20, 24, 28, 36, 44, ...; Paley, "On orthogonal matrices", 1933), and
where no power of two times the odd part of K is one of these, a random orthogonal matrix of the odd part,
the same each time.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .errors import FormatError

_library: Any = torch.library.Library("bitfold", "FRAGMENT")  # type: ignore[no-untyped-call]

# A core is a dense product; one that is larger than this costs more than the additions that it saves.
_LARGEST = 64


def hadamard(x: Tensor, back: bool = False) -> Tensor:
    """x M, or x M^T with `back`, in x's dtype; computed in float32 (float64 stays)."""
    k = x.shape[-1]
    if k < 1:
        raise FormatError("there is no transform of a dimension of size 0")
    wide = x if x.dtype == torch.float64 else x.float()
    core, scale = _core(k)
    m = len(core)
    parts = _walsh(wide.reshape(*x.shape[:-1], m, k // m))
    if m > 1:
        matrix = torch.tensor(core, dtype=wide.dtype, device=x.device)
        parts = (matrix if back else matrix.mT) @ parts
    return (parts * scale).reshape(x.shape).to(x.dtype)


def hadamard_matrix(k: int, device: torch.device | str = "cpu") -> Tensor:
    """M itself, float64 [k, k]: the reference."""
    core, scale = _core(k)
    power, left = torch.ones(1, 1, dtype=torch.float64), k // len(core)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while left > 1:
        power, left = torch.kron(step, power), left // 2
    return (torch.kron(torch.tensor(core, dtype=torch.float64), power) * scale).to(device)


def _walsh(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of the last dimension, a power of two, not scaled."""
    n, half = x.shape[-1], 1
    while half < n:
        first, second = x.reshape(*x.shape[:-1], n // (2 * half), 2, half).unbind(-2)
        x = torch.stack([first + second, first - second], -2).reshape(x.shape)
        half *= 2
    return x


@cache
def _core(k: int) -> tuple[list[list[float]], float]:
    """The core, and what the whole is multiplied by to be orthogonal."""
    odd = k
    while odd % 2 == 0:
        odd //= 2
    m = odd
    while m <= min(k, _LARGEST) and k % m == 0:
        found = _hadamard(m)
        if found is not None:
            return found, 1 / math.sqrt(k)
        m *= 2
    draw = torch.randn(odd, odd, dtype=torch.float64, generator=torch.Generator().manual_seed(odd))
    orthogonal = torch.linalg.qr(draw)[0]
    return orthogonal.tolist(), 1 / math.sqrt(k // odd)


def _hadamard(m: int) -> list[list[float]] | None:
    """A Hadamard matrix of order m: 1, or one of Paley's over a prime field; None for other orders."""
    if m == 1:
        return [[1.0]]
    if m % 4 == 0 and _prime(m - 1) and (m - 1) % 4 == 3:
        q = m - 1
        skew = torch.zeros(m, m, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
        found: list[list[float]] = (skew + torch.eye(m, dtype=torch.float64)).tolist()
        return found
    if m % 4 == 0 and _prime(m // 2 - 1) and (m // 2 - 1) % 4 == 1:
        q = m // 2 - 1
        symmetric = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        symmetric[0, 1:], symmetric[1:, 0] = 1, 1
        symmetric[1:, 1:] = _jacobsthal(q)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        both = torch.kron(symmetric, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
        return both.tolist()
    return None


def _jacobsthal(q: int) -> Tensor:
    """Entry (i, j): whether i - j is a square modulo the prime q (1), none (-1), or 0."""
    squares = {i * i % q for i in range(1, q)}
    character = [0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)]
    rows = [[character[(i - j) % q] for j in range(q)] for i in range(q)]
    return torch.tensor(rows, dtype=torch.float64)


def _prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))


_library.define("hadamard(Tensor x, bool back=False) -> Tensor")
_library.impl("hadamard", hadamard, "CompositeImplicitAutograd")
