"""Kernels of one x as one call give what each gave alone, and are joined only where nothing stands between.

q, k, v = fused([x, ..])[0], fused([x, ..])[0], fused([x, ..])[0]   ->   fused_beside([x, .., .., ..])
"""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import bitfold as bf
from bitfold.codegen import CodegenError, GemmSpec
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.formats import format
from bitfold.lowering.cpu.beside import BESIDE, BETWEEN, FUSED, apart, beside

K = 192
TEXTS = ["int8", "int4[g64]", "int3[g64]", "uint4[g32,zero]", "nf4[g64]"]


def spec_of(text: str, n: int, *, bias: bool = False, x: str = "f32") -> GemmSpec:
    weight, _, of_x = text.partition(" x ")
    activation = format(of_x) if of_x else None
    laid_out = cpu_layout(format(weight), K, activation)
    assert laid_out is not None
    return GemmSpec(laid_out, n, K, x, bias=bias, activation=activation)


def operands(spec: GemmSpec, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = list(spec.weight.quantize(torch.randn(spec.n, K, generator=generator)).parts)
    return [*parts, *([torch.randn(spec.n, generator=generator).to(spec.dtype)] if spec.bias else [])]


@pytest.mark.parametrize("m", [0, 1, 3, 20])
@pytest.mark.parametrize("text", [*TEXTS, "int8 x int8"])
def test_equal_to_the_calls_alone(text: str, m: int) -> None:
    """Bit for bit, by each way of making x ready; rows that are no whole tasks."""
    specs = [spec_of(text, n) for n in (64, 13, 22)]
    x = torch.randn(m, K, generator=torch.Generator().manual_seed(m))
    of_x = [x] if specs[0].activation is None else list(specs[0].activation.quantize(x).parts)
    own = [operands(spec, i) for i, spec in enumerate(specs)]
    alone = [
        torch.ops.bitfold.fused([*of_x, *given], str(spec))[0] for given, spec in zip(own, specs, strict=True)
    ]
    inputs = [*of_x, *(tensor for given in own for tensor in given)]
    found = torch.ops.bitfold.fused_beside(inputs, BETWEEN.join(map(str, specs)))
    assert len(found) == 3 and all(map(torch.equal, found, alone))


@pytest.mark.parametrize("m", [1, 20])
def test_kernels_that_differ_in_everything_but_x(m: int) -> None:
    """x is made ready for each as that one wants it: in digits, in words, as floats; with a bias."""
    specs = [
        spec_of("int4[g64]", 24),
        spec_of("int8", 13, bias=True),
        spec_of("nf4[g64]", 8),
        spec_of("int4[g64]", 4),
    ]
    x = torch.randn(m, K, generator=torch.Generator().manual_seed(9))
    own = [operands(spec, i) for i, spec in enumerate(specs)]
    alone = [
        torch.ops.bitfold.fused([x, *given], str(spec))[0] for given, spec in zip(own, specs, strict=True)
    ]
    inputs = [x, *(tensor for given in own for tensor in given)]
    found = torch.ops.bitfold.fused_beside(inputs, BETWEEN.join(map(str, specs)))
    assert all(map(torch.equal, found, alone))


def test_tensors_too_few_or_too_many() -> None:
    specs = [spec_of("int8", 8), spec_of("int8", 4)]
    x, own = torch.randn(1, K), [operands(spec, i) for i, spec in enumerate(specs)]
    inputs, texts = [x, *own[0], *own[1]], BETWEEN.join(map(str, specs))
    assert [text for _, text in apart(inputs, texts)] == [str(spec) for spec in specs]
    torch.ops.bitfold.fused_beside(inputs, texts)
    with pytest.raises(CodegenError, match="tensors, not 6"):
        apart([*inputs, x], texts)
    with pytest.raises(RuntimeError, match="too few tensors"):
        torch.ops.bitfold.fused_beside(inputs[:-1], texts)


def graph_of(write: bool = False, chained: bool = False) -> GraphModule:
    """Two kernels of one x; with a write between them, or the second reading the first's result."""
    graph, spec = Graph(), spec_of("int8", K)
    bias = spec_of("int8", K, bias=True)
    x, *weights = [graph.placeholder(name) for name in ("x", "a", "s", "b", "t", "c")]
    x.meta["val"] = torch.empty(1, K)
    calls = []
    for i in range(2):
        more = [weights[4]] if not chained or i == 0 else [calls[0]]
        call = graph.call_function(FUSED, ([x, *weights[2 * i : 2 * i + 2], *more], str(bias)))
        call.meta["val"] = [torch.empty(1, K)]
        calls.append(graph.call_function(operator.getitem, (call, 0)))
        calls[-1].meta["val"] = call.meta["val"][0]
        if write and i == 0:
            graph.call_function(torch.ops.aten.copy_.default, (weights[4], weights[3]))
    graph.output(tuple(calls))
    assert spec.k == K
    return GraphModule(nn.Module(), graph)


def test_joined_in_a_graph() -> None:
    gm = graph_of()
    assert beside(gm) == 1
    gm.graph.lint()
    (call,) = gm.graph.find_nodes(op="call_function", target=BESIDE)
    assert [node.name for node in call.args[0]] == ["x", "a", "s", "c", "b", "t", "c"]
    assert not gm.graph.find_nodes(op="call_function", target=FUSED)


@pytest.mark.parametrize("what", ["write", "chained"])
def test_left_apart(what: str) -> None:
    gm = graph_of(**{what: True})
    before = str(gm.graph)
    assert beside(gm) == 0 and str(gm.graph) == before


class Attention(nn.Module):
    """Enough layers to be cut into pieces that C++ runs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, K), nn.Linear(K, 64), nn.Linear(K, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat([self.q(x)[..., :64] * self.k(x), self.v(x).tanh(), self.q(x)[..., 64:128]], -1)


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("m", [1, 20])
def test_compiled(layers: int, m: int) -> None:
    """Behind Inductor's Python and its C++ alike."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Attention() for _ in range(layers))).eval()
    x = torch.randn(m, K)
    q = bf.quantize(model, "int8")
    with torch.inference_mode():
        want = q(x)
        run = torch.compile(q, backend="bitfold", options={"recipe": "none"}, dynamic=False)
        for _ in range(2):
            assert torch.allclose(run(x), want, rtol=1e-4, atol=1e-4)
