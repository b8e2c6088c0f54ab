"""A model whose modules were folded one by one, and then compiled: kernels are spliced across its modules.

bf.quantize(model, ..); torch.compile(model, backend="bitfold")  ->  one kernel for gate, up, silu(gate) * up
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention, silu

import bitfold as bf
from bitfold.lowering import register_target
from bitfold.lowering import target as targets
from bitfold.lowering.cuda.target import CudaTarget
from bitfold.lowering.fused import parsed
from bitfold.lowering.splice import expanded

FUSED = torch.ops.bitfold.fused.default


@pytest.fixture(autouse=True)
def here() -> Iterator[type]:
    @register_target
    class Here(CudaTarget):
        """Kernels on this CPU: the graph as compiled is kept, and runs as the operators it stands for."""

        name = "here"
        device = "cpu"
        seen: ClassVar[list[list[str]]] = []

        def compile(self, gm: GraphModule, example_inputs: Any, config: Any) -> Any:
            calls = gm.graph.find_nodes(op="call_function", target=FUSED)
            self.seen.append([f"{spec.weights} {spec.epilogue}" for spec in map(spec_of, calls)])
            for call in calls:
                expanded(gm.graph, call, torch.bfloat16)
            gm.recompile()
            return gm.forward

    yield Here
    targets._registered.pop("here")
    torch.compiler.reset()


def spec_of(call: torch.fx.Node) -> Any:
    return parsed(str(call.args[1]))


class Block(nn.Module):
    """A layer of a Llama, for one token: attention over nothing else, and a gated MLP."""

    def __init__(self, d: int = 64, ff: int = 96) -> None:
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.gate, self.up = (nn.Linear(d, ff, bias=False) for _ in range(2))
        self.down = nn.Linear(ff, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.qkv(self.n1(x)).chunk(3, -1))
        x = x + self.o(scaled_dot_product_attention(q, k, v).squeeze(1))
        h = self.n2(x)
        return x + self.down(silu(self.gate(h)) * self.up(h))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(64, 32)).bfloat16().eval()


ONE_BLOCK = ["1 y0", "1 add(e0,y0)", "2 mul(silu(y0),y1)", "1 add(e0,y0)"]


@pytest.mark.parametrize(
    ("recipe", "ahead"),
    [("int4[g32]", True), ("int8_dynamic", True), ("int4[g32]", False)],
)
def test_kernels_are_spliced_across_modules(here: Any, recipe: str, ahead: bool) -> None:
    given, x = model(), torch.randn(2, 1, 64, dtype=torch.bfloat16)
    if ahead:
        bf.quantize(given, recipe, target="here")
    options = {"recipe": recipe, "target": "here", "mode": "reduce-overhead"}
    fast = torch.compile(given, backend="bitfold", options=options, fullgraph=True)
    reference = bf.quantize(model(), recipe, target="reference")
    with torch.inference_mode():
        y = fast(x)
        assert here.seen == [[*ONE_BLOCK, *ONE_BLOCK, "1 y0"]]
        torch.testing.assert_close(y, reference(x), rtol=2**-5, atol=2**-5)
