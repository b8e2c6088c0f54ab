"""Regions that are alike become calls of one subgraph; others do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.backend import bitfold as backend
from bitfold.lowering.cpu.target import CpuTarget
from bitfold.lowering.shared_regions import share_regions
from bitfold.passes.fuse import inline

CALL = torch.ops.higher_order.invoke_subgraph


class Tower(nn.Module):
    """Three alike linears, one with an activation behind it, one of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.alike = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.active = nn.Linear(64, 64)
        self.wide = nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.alike:
            x = layer(x) * x.sin()
        return self.wide(torch.relu(self.active(x)))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one linears are torch that Inductor fuses; kernels are compiled apart, and share nothing."""
    monkeypatch.setattr(CpuTarget, "missing", lambda self: "there is no C++ compiler")


def lowered(recipe: str = "int8") -> torch.fx.GraphModule:
    torch.manual_seed(0)
    gm = bf.capture(Tower().eval(), (torch.randn(2, 64),))
    bf.Pipeline.parse(f"annotate{{recipe={recipe}}},fold,fuse,lower{{target=cpu}}").run(gm)
    return gm


def test_kernels_share_nothing() -> None:
    assert share_regions(lowered()) == 0


def test_alike_regions_share_one_subgraph_and_give_the_same_numbers(no_compiler: None) -> None:
    x = torch.randn(2, 64)
    plain = lowered()
    inline(plain)
    plain.recompile()
    gm = lowered()
    assert share_regions(gm) == 3
    inline(gm)
    gm.recompile()
    calls = gm.graph.find_nodes(op="call_function", target=CALL)
    assert len(calls) == 3 and len({call.args[0].target for call in calls}) == 1
    # The activation is in the region of `active`, and `wide` has another shape: both stand in the graph.
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.bitfold.cpu_linear.default)) == 2
    with torch.inference_mode():
        assert torch.equal(gm(x), plain(x))


def test_compiled_the_model_has_the_numbers_of_the_reference() -> None:
    torch.manual_seed(0)
    model, x = Tower().eval(), torch.randn(2, 64)
    reference = Tower().eval()
    reference.load_state_dict(model.state_dict())
    bf.quantize(reference, "int8", target="reference")
    compiled = torch.compile(model, backend=backend, options={"recipe": "int8"})
    with torch.inference_mode():
        wanted = reference(x)
        torch.testing.assert_close(compiled(x), wanted)
        model.alike[1].weight.mul_(2)  # the codes of one of those who share a body
        model.alike[1].bias.add_(1)
        again = Tower().eval()
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(compiled(x), bf.quantize(again, "int8", target="reference")(x))
