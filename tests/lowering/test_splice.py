"""What is taken into a kernel, and what is not: graphs as they are after the CUDA target is done with them.

x + down(silu(gate(x)) * up(x))   ->   two kernels, `mul(silu(y0),y1)` and `add(e0,y0)`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

import bitfold as bf
from bitfold.lowering import register_target
from bitfold.lowering import target as targets
from bitfold.lowering.cuda.target import CudaTarget
from bitfold.lowering.fused import parsed
from bitfold.lowering.splice import expanded
from bitfold.passes.fuse import inline

FUSED = torch.ops.bitfold.fused.default


@pytest.fixture(autouse=True)
def here() -> Iterator[None]:
    @register_target
    class Here(CudaTarget):
        name = "here"
        device = "cpu"

    yield
    targets._registered.pop("here")


class Net(nn.Module):
    """Three linears of one shape, and a function of them and x [.., 64]."""

    def __init__(self, body: Callable[..., Tensor], bias: bool) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(64, 96, bias=bias) for _ in range(2))
        self.c = nn.Linear(96, 64, bias=bias)
        self.register_buffer("column", torch.randn(96))
        self.register_buffer("written", torch.zeros(2, 96))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def spliced(
    body: Callable[..., Tensor], recipe: str = "int4[g32]", bias: bool = False
) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    gm = bf.capture(Net(body, bias).bfloat16().eval(), (torch.randn(2, 64, dtype=torch.bfloat16),))
    bf.Pipeline.parse(f'annotate{{recipe="{recipe}"}},fold,fuse,lower{{target=here}}').run(gm)
    inline(gm)
    targets.get_target("here").finish(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def epilogues(gm: torch.fx.GraphModule) -> list[str]:
    found = [parsed(str(node.args[1])) for node in gm.graph.find_nodes(op="call_function", target=FUSED)]
    return [f"{spec.weights} {spec.epilogue}" for spec in found]


def silu_as_written(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def reads_twice(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return torch.relu(y) + m.c(y)[:, :1]


def writes_between(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    m.written.add_(1)
    return torch.relu(y)


def many_residuals(m: Net, x: Tensor) -> Tensor:
    y, rows = m.a(x), torch.cat([x, x[:, :32]], 1)
    for i in range(12):
        y = y + rows * (i + 2)
    return y


BODIES: list[tuple[str, Callable[[Net, Tensor], Tensor], list[str]]] = [
    ("relu", lambda m, x: torch.relu(m.a(x)), ["1 relu(y0)"]),
    ("chain", lambda m, x: gelu(m.a(x), approximate="tanh") * 0.5 - 1, ["1 sub(mul(gelu_tanh(y0),0.5),1.0)"]),
    ("mlp", lambda m, x: x + m.c(silu(m.a(x)) * m.b(x)), ["2 mul(silu(y0),y1)", "1 add(e0,y0)"]),
    ("the other way round", lambda m, x: m.b(x) * gelu(m.a(x)), ["2 mul(y0,gelu(y1))"]),
    ("a number a column", lambda m, x: m.a(x) * m.column, ["1 mul(y0,v0)"]),
    ("column and residual", lambda m, x: m.a(x) * m.column + m.written, ["1 add(mul(y0,v0),e0)"]),
    ("clamp", lambda m, x: torch.clamp(m.a(x), min=-1), ["1 clamp(y0,-1.0,inf)"]),
    ("itself", lambda m, x: m.a(x) + m.a(x) * 0, ["2 add(y0,mul(y1,0.0))"]),
    ("another x", lambda m, x: m.a(x) + m.a(x * 2), ["1 y0", "1 add(y0,e0)"]),
    ("a result that two read", reads_twice, ["1 y0", "1 y0"]),
    ("sigmoid by hand", lambda m, x: silu_as_written(m.a(x)), ["1 y0"]),
    ("a broadcast row", lambda m, x: m.a(x) + m.written[:1], ["1 y0"]),
    ("another type", lambda m, x: m.a(x) + m.column.float(), ["1 y0"]),
    ("alpha", lambda m, x: torch.add(m.a(x), m.written, alpha=2), ["1 y0"]),
    ("what no kernel has", lambda m, x: torch.cos(m.a(x)), ["1 y0"]),
    ("a write between", writes_between, ["1 y0"]),
    (
        "more than a kernel reads",
        many_residuals,
        [f"1 {'add(' * 8}y0,{'),'.join(f'e{i}' for i in range(8))})"],
    ),
]


@pytest.mark.parametrize(("body", "want"), [pair[1:] for pair in BODIES], ids=[pair[0] for pair in BODIES])
def test_what_is_taken_in(body: Callable[..., Tensor], want: list[str]) -> None:
    assert epilogues(spliced(body)) == want


@pytest.mark.parametrize(
    "recipe", ["int4[g32]", "int8_dynamic", "fp8_dynamic", "mxfp4_dynamic", "uint4[g32,zero]"]
)
def test_a_spliced_graph_computes_what_the_operators_do(recipe: str) -> None:
    """Expanded again, it is the graph as it was: the same weights in the same places."""

    def body(m: Net, x: Tensor) -> Tensor:
        return x + m.c(silu(m.a(x)) * m.b(x))

    torch.manual_seed(0)
    net = Net(body, bias=True).bfloat16().eval()
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    gm = spliced(body, recipe, bias=True)
    for call in gm.graph.find_nodes(op="call_function", target=FUSED):
        expanded(gm.graph, call, torch.bfloat16)
    gm.recompile()
    bf.quantize(net, recipe, target="reference")
    with torch.inference_mode():
        torch.testing.assert_close(gm(x), net(x), rtol=2**-6, atol=2**-6)


def test_activations_in_codes_reach_the_kernel() -> None:
    for recipe, text in (
        ("int8_dynamic", "linear 96x64 bf16 int8 x:int8"),
        ("fp8_dynamic", "linear 96x64 bf16 float8_e4m3fn x:float8_e4m3fn"),
    ):
        gm = spliced(lambda m, x: m.a(x), recipe)
        (call,) = gm.graph.find_nodes(op="call_function", target=FUSED)
        assert call.args[1] == text
        quantized = call.args[0][0].args[0]
        assert quantized.target is torch.ops.bitfold.quantize.default


def test_without_tensor_cores_for_float8_activations_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitfold.codegen.device import device

    monkeypatch.setattr("bitfold.lowering.cuda.target.present", lambda: device("NVIDIA A100"))
    gm = spliced(lambda m, x: m.a(x), "fp8_dynamic")
    (call,) = gm.graph.find_nodes(op="call_function", target=FUSED)
    assert call.args[1] == "linear 96x64 bf16 float8_e4m3fn[halves64]"
    assert call.args[0][0].target is torch.ops.bitfold.dequantize.default


def test_spliced_modules_survive_a_cast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32)).bfloat16().eval()
    reference = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32)).bfloat16().eval()
    reference.load_state_dict(model.state_dict())
    bf.quantize(model, "int8_dynamic", target="here")
    bf.quantize(reference, "int8_dynamic", target="reference")
    x = torch.randn(3, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model.float()(x), reference.float()(x))
