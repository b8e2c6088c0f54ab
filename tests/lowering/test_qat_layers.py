"""Layers beside the usual ones that train on rounded numbers, and layers that are alike."""

import copy

import pytest
import torch
import torch.nn.functional as F
from qat_cases import OPTIONS, step
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.qat.prepared import Prepared
from bitfold.passes.rules import Rule


class Squared(nn.Module):
    """A forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        return F.linear(x * x, self.weight)


def test_a_module_with_a_forward_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Squared()), torch.randn(3, 16)
    bf.prepare_qat(model, "int4[g16]", bf.Qat("lsq"), example_inputs=(x,))
    step(model, x, torch.optim.SGD(model.parameters(), lr=0.1))
    expected = model.eval()(x).detach()
    assert torch.equal(bf.convert(model, target="reference")(x), expected)


def test_a_sparse_format_keeps_its_mask_in_training() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(4, 32)
    recipe = bf.Recipe("r", (Rule(weight="int4[g16,2:4]"),))
    with pytest.raises(bf.BitfoldError, match="sparse"):
        bf.prepare_qat(model, recipe, bf.Qat("lsq"))
    bf.prepare_qat(model, recipe)
    for _ in range(3):
        step(model, x, torch.optim.SGD(model.parameters(), lr=1.0))
    half, y = copy.deepcopy(model).to(torch.bfloat16), x.bfloat16()
    step(half, y, torch.optim.SGD(half.parameters(), lr=1.0))
    for one, given in ((model, x), (half, y)):
        expected = one.eval()(given).detach()
        assert torch.equal(bf.convert(one, target="reference")(given), expected)


def test_a_weight_that_is_read_past_its_forward_is_left_and_reported() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return self.attention(x, x, x)[0]

    model, x = Attends(), torch.randn(2, 3, 16)
    bf.prepare_qat(model, "int8")
    assert isinstance(model.fc, Prepared) and not isinstance(model.attention.out_proj, Prepared)
    expected = model.eval()(x).detach()
    assert torch.equal(bf.convert(model, target="reference")(x), expected)
    assert any("without calling it" in str(miss) for miss in bf.report(model).misses)


@pytest.mark.parametrize("how", ["straight", "lsq"])
def test_experts_in_a_program(how: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 32, 16) / 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.weight)

    torch.manual_seed(0)
    x = torch.randn(2, 3, 32)
    gm = bf.prepare_qat(Experts(), "int4[g16]", OPTIONS[how], scope="program", example_inputs=(x,))
    step(gm, x, torch.optim.SGD(gm.parameters(), lr=0.1))
    expected = gm.eval()(x).detach()
    assert torch.equal(bf.convert(gm, target="reference")(x), expected)


class Block(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def test_layers_that_are_alike_are_compiled_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layers = [Block() for _ in range(4)]
    model = bf.prepare_qat(nn.Sequential(*layers), "int4[g16]", bf.Qat("lsq"))
    counter = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True)
    model(torch.randn(3, 16, requires_grad=True)).sum().backward()
    assert counter.frame_count == 1
