"""A program compiled without Dynamo: the same numbers, any size, one sentence for what it cannot take."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf

pytestmark = pytest.mark.skipif(bool(bf.get_target("cpu").missing()), reason="there is no C++ compiler")


class Counting(nn.Module):
    """Nested arguments and results, a keyword, a buffer that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, given: dict[str, Tensor], *, shift: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.fc(given["x"]) + shift
        self.seen.add_(y.sum(0))
        return y, {"seen": self.seen * 2, "less": y - given["less"]}


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).eval()


def program(recipe: str = "int8", **more: object) -> torch.fx.GraphModule:
    made = bf.quantize(chain(), recipe, scope="program", example_inputs=(torch.randn(4, 32),), **more)
    assert isinstance(made, torch.fx.GraphModule)
    return made


def test_the_same_numbers_without_tracing() -> None:
    made, x = program(), torch.randn(4, 32)
    fast = bf.compile(made)
    with mock.patch("torch._dynamo.convert_frame.compile_frame", side_effect=AssertionError), torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), made(x))
    assert not fast(x).requires_grad


def test_nested_arguments_and_a_buffer_that_is_written_to() -> None:
    torch.manual_seed(0)
    model = Counting()
    example = {"given": {"x": torch.randn(4, 32), "less": torch.ones(8)}, "shift": torch.full((8,), 2.0)}
    made = bf.quantize(model, "int8", scope="program", example_inputs=example)
    fast, slow = bf.compile(copy.deepcopy(made)), made
    with torch.no_grad():
        for _ in range(3):
            ours, theirs = fast(**example), slow(**example)
            torch.testing.assert_close(ours, theirs)
            assert type(ours) is type(theirs)
    torch.testing.assert_close(fast.program.seen, slow.seen)
    with pytest.raises(bf.BitfoldError, match="keyword arguments"):
        fast(given=example["given"])
    with pytest.raises(bf.BitfoldError, match="not nested"):
        fast(given=(torch.ones(4, 32),), shift=torch.ones(8))


def test_each_size_has_a_function_of_its_own() -> None:
    made = program(dynamic="batch")
    fast = bf.compile(made)
    with torch.no_grad():
        for rows in (4, 7, 4, 1):
            x = torch.randn(rows, 32)
            torch.testing.assert_close(fast(x), made(x))
            torch.testing.assert_close(fast(x.mT.contiguous().mT), made(x))  # other strides
    assert len(fast._known) == 5  # one row lies alike both ways


def test_tensors_are_read_where_the_program_holds_them(tmp_path: Path) -> None:
    made, x = program(), torch.randn(4, 32)
    bf.save(made, tmp_path / "p")
    loaded = bf.load(tmp_path / "p")
    fast = bf.compile(loaded)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), made(x))
        loaded.get_submodule("2").bias = nn.Parameter(loaded.get_parameter("2.bias") + 1)
        torch.testing.assert_close(fast(x), loaded(x))
        assert not torch.allclose(fast(x), made(x))


def test_what_it_cannot_take_is_one_sentence() -> None:
    with pytest.raises(bf.BitfoldError, match=r"takes a program .* not a Sequential"):
        bf.compile(chain())
    made = program()
    with pytest.raises(bf.BitfoldError, match="quantized already"):
        bf.compile(made, recipe="int4")
    fast = bf.compile(made)
    with pytest.raises(
        bf.BitfoldError, match=r"float32 of sizes \[4, 32\] on cpu, not float32 of sizes \[5, 32"
    ):
        fast(torch.randn(5, 32))
    with pytest.raises(bf.BitfoldError, match="not float64"):
        fast(torch.randn(4, 32, dtype=torch.float64))
    with pytest.raises(bf.BitfoldError, match=r"not nested|takes 1 inputs"):
        fast(torch.randn(4, 32), torch.randn(4, 32))
    with pytest.raises(bf.BitfoldError, match="option"):
        bf.compile(made, nonsense=1)(torch.randn(4, 32))
