"""The Hadamard transform against its matrix, for orders of every kind."""

from __future__ import annotations

import pytest
import torch

from bitfold.formats import FormatError
from bitfold.formats.hadamard import hadamard_matrix

# 1, powers of two, Paley's first kind (12, 20, 24, 44), his second (28, 36), with factors, and odd ones.
ORDERS = [1, 2, 8, 64, 12, 20, 24, 28, 36, 44, 48, 96, 288, 384, 576, 768, 896, 5, 26, 75]


@pytest.mark.parametrize("k", ORDERS)
def test_it_is_an_orthogonal_matrix_applied_fast(k: int) -> None:
    matrix = hadamard_matrix(k)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(k, dtype=torch.float64), atol=1e-12)
    x = torch.randn(3, 2, k, dtype=torch.float64)
    y = torch.ops.bitfold.hadamard(x)
    assert torch.allclose(y, x @ matrix, atol=1e-12)
    assert torch.allclose(torch.ops.bitfold.hadamard(y, True), x, atol=1e-12)
    half = torch.ops.bitfold.hadamard(x.bfloat16())
    # One rounding to bfloat16 at the end, 2^-8 relative, and float32 inside.
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.double(), x.bfloat16().double() @ matrix, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("k", [2, 12, 28, 36, 384, 576, 768, 5120, 14336])
def test_no_entry_stands_out_where_a_hadamard_matrix_is_known(k: int) -> None:
    row = torch.ops.bitfold.hadamard(torch.nn.functional.one_hot(torch.tensor(k // 3), k).double())
    assert torch.allclose(row.abs(), torch.full_like(row, k**-0.5), atol=1e-12)


def test_it_compiles_and_takes_gradients() -> None:
    x = torch.randn(4, 48, requires_grad=True)
    torch.ops.bitfold.hadamard(x).square().sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, 2 * x, atol=1e-5)  # orthogonal
    compiled = torch.compile(lambda v: torch.ops.bitfold.hadamard(v), backend="aot_eager")
    assert torch.equal(compiled(x.detach()), torch.ops.bitfold.hadamard(x.detach()))


def test_nothing_is_no_dimension() -> None:
    with pytest.raises(FormatError, match="size 0"):
        torch.ops.bitfold.hadamard(torch.empty(3, 0))
