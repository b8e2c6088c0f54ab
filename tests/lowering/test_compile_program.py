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


class Writing(nn.Module):
    """Writes to its second argument; adds its third to the result."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor, state: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        before = x.sin()
        state.add_(1.0)
        return self.fc(x * 2 + before) + y, state * 1.0


def test_what_is_written_to_shares_memory_with_nothing_else() -> None:
    given = [torch.randn(4, 32) for _ in range(3)]
    made = bf.quantize(Writing(), "int8", scope="program", example_inputs=tuple(given))
    assert isinstance(made, torch.fx.GraphModule)
    fast, a = bf.compile(made), torch.randn(4, 32)
    with torch.no_grad():
        for first in (True, False):  # before anything is compiled, and after
            for shared in ((a, a, given[2]), (a.view(4, 32), a, given[2]), (given[0], a, a)):
                with pytest.raises(bf.BitfoldError, match="shares memory with another"):
                    fast(*shared)
            wanted, state = made(a, a.clone(), a)
            got = fast(a, a.clone(), a)  # what is only read may be one tensor
            torch.testing.assert_close(got[0], wanted), torch.testing.assert_close(got[1], state)
            assert first or fast._known


def test_a_copy_runs_its_own_program() -> None:
    fast, x = bf.compile(program()), torch.randn(4, 32)
    with torch.no_grad():
        wanted = fast(x)
        other = copy.deepcopy(fast)
        for tensor in other.program.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(1.0)
        torch.testing.assert_close(other(x), other.program(x))
        assert not torch.allclose(other(x), wanted) and torch.equal(fast(x), wanted)


class Scaled(nn.Module):
    """A number among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor, times: int) -> Tensor:
        return self.fc(x) * times


def test_a_number_among_the_arguments_is_refused() -> None:
    made = bf.quantize(Scaled(), "int8", scope="program", example_inputs=(torch.randn(4, 32), 2))
    assert isinstance(made, torch.fx.GraphModule)
    with pytest.raises(bf.BitfoldError, match="takes tensors, and the input times"):
        bf.compile(made)(torch.randn(4, 32), 2)


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x) + y


def test_sizes_that_vary_are_those_that_were_captured() -> None:
    n = torch.export.Dim("n", min=2, max=16)
    made = bf.quantize(
        Added(), "int8", scope="program", example_inputs=(torch.randn(4, 32), torch.randn(4, 32)),
        dynamic={"x": {0: n}, "y": {0: n}},
    )  # fmt: skip
    assert isinstance(made, torch.fx.GraphModule)
    fast, x, y = bf.compile(made), torch.randn(20, 32), torch.randn(20, 32)
    with torch.no_grad():
        torch.testing.assert_close(fast(x[:7], y[:7]), made(x[:7], y[:7]))
        with pytest.raises(
            bf.BitfoldError, match=r"size 0 of the input x is 20; it was captured for 2 to 16"
        ):
            fast(x, y)
        with pytest.raises(bf.BitfoldError, match=r"size 0 of the input y is 2 and size 0 of the input x 7"):
            fast(x[:7], y[:2])
