"""Experts, `aten._grouped_mm` on a weight [E, N, K]: quantized per expert, run by whoever takes them.

gate, up [4, 96, 64]; down [4, 64, 96]   ->   "grouped 4 96x64 .. -> mul(silu(y0),y1)", "grouped 4 64x96 .."
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

import bitfold as bf
from bitfold.codegen import CodegenError, GemmSpec
from bitfold.codegen.triton.build import check
from bitfold.formats import format
from bitfold.lowering import register_target
from bitfold.lowering import target as targets
from bitfold.lowering.cuda.target import CudaTarget
from bitfold.lowering.folded import Folded
from bitfold.lowering.fused import fake, parsed
from bitfold.lowering.splice import expanded
from bitfold.passes.fuse import inline

FUSED = torch.ops.bitfold.fused.default
E, N, K = 4, 96, 64


@pytest.fixture(autouse=True)
def here() -> Iterator[None]:
    @register_target
    class Here(CudaTarget):
        name = "here"
        device = "cpu"

    yield
    targets._registered.pop("here")


class Experts(nn.Module):
    """The feed-forward of a mixture, for tokens that are sorted by expert already."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(E, N, K) * 0.1) for _ in range(2))
        self.down = nn.Parameter(torch.randn(E, K, N) * 0.1)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        def times(x: Tensor, weight: Tensor) -> Tensor:
            return grouped_mm(x, weight.transpose(-2, -1), offs=ends)

        return times(silu(times(x, self.gate)) * times(x, self.up), self.down)


def made(kind: Callable[[], nn.Module] = Experts) -> nn.Module:
    torch.manual_seed(0)
    return kind().bfloat16().eval()


def tokens(*ends: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(ends[-1], K, generator=torch.Generator().manual_seed(1))
    return x.bfloat16(), torch.tensor(ends, dtype=torch.int32)


def lowered(model: nn.Module, recipe: str, target: str) -> torch.fx.GraphModule:
    gm = bf.capture(model, tokens(2, 2, 7, 10))
    bf.Pipeline.parse(f'annotate{{recipe="{recipe}"}},fold,fuse,lower{{target={target}}}').run(gm)
    inline(gm)
    targets.get_target(target).finish(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def texts(gm: torch.fx.GraphModule) -> list[str]:
    return [str(node.args[1]) for node in gm.graph.find_nodes(op="call_function", target=FUSED)]


def test_each_expert_is_quantized_by_itself() -> None:
    """The codes of all are those of each alone."""
    weight = torch.randn(E, N, K) * torch.arange(1, E + 1)[:, None, None]
    for text in ("int4[g32]", "int8", "mxfp4", "uint4[g32,zero]", "float8_e4m3fn[g32]"):
        fmt = format(text)
        together = fmt.quantize(weight)
        for e in range(E):
            for part, alone in zip(together.parts, fmt.quantize(weight[e]).parts, strict=True):
                assert torch.equal(part[e], alone), text


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("recipe", ["int4[g32]", "int8", "fp8_dynamic", "mxfp4"])
def test_without_a_kernel_the_library_multiplies_what_is_decoded(target: str, recipe: str) -> None:
    gm = lowered(made(), recipe, target)
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten._grouped_mm.default)) == 3
    model = made()
    fmt = format(str(bf.Recipe.parse(recipe).rules[0].weight))
    for name in ("gate", "up", "down"):
        held = getattr(model, name)
        held.data = fmt.quantize(held.data).dequantize(held.dtype)
    x, ends = tokens(1, 1, 6, 10)
    with torch.inference_mode():
        if recipe == "fp8_dynamic":  # activations are rounded to 8 bits too: 2**-4 of each, in two products
            torch.testing.assert_close(gm(x, ends), model(x, ends), rtol=2**-3, atol=2**-3)
        else:
            assert torch.equal(gm(x, ends), model(x, ends))


@pytest.mark.parametrize(
    ("recipe", "want"),
    [
        ("int4[g32]", ["2*int4[g32,halves64]", "int4[g32,halves128]"]),
        ("int8", ["2*int8[halves64]", "int8[halves32]"]),
        ("int8[tensor]", ["2*int8[tensor,halves64]", "int8[tensor,halves32]"]),
        ("int8_dynamic", ["2*int8 x:int8", "int8 x:int8"]),
        ("fp8_dynamic", ["2*float8_e4m3fn x:float8_e4m3fn", "float8_e4m3fn x:float8_e4m3fn"]),
    ],
)
def test_kernels_take_experts_and_gate_and_up_are_one(recipe: str, want: list[str]) -> None:
    gm = lowered(made(), recipe, "here")
    kernels = [f"grouped 4 96x64 bf16 {want[0]} -> mul(silu(y0),y1)", f"grouped 4 64x96 bf16 {want[1]}"]
    assert [str(GemmSpec.parse(text)) for text in texts(gm)] == kernels
    for call in gm.graph.find_nodes(op="call_function", target=FUSED):
        spec, inputs = parsed(str(call.args[1])), [node.meta["val"] for node in call.args[0]]
        assert spec.arity == len(inputs)
        assert fake(inputs, str(spec))[0].shape == call.meta["val"][0].shape
        assert spec.inputs(inputs).ends.dtype == torch.int32  # type: ignore[union-attr]


@pytest.mark.parametrize("recipe", ["int4[g32]", "int8_dynamic", "fp8_dynamic", "uint4[g32,zero]"])
def test_a_spliced_graph_computes_what_the_operators_do(recipe: str) -> None:
    gm = lowered(made(), recipe, "here")
    for call in gm.graph.find_nodes(op="call_function", target=FUSED):
        expanded(gm.graph, call, torch.bfloat16)
    gm.recompile()
    x, ends = tokens(3, 3, 4, 10)
    with torch.inference_mode():
        want = lowered(made(), recipe, "reference")(x, ends)
        torch.testing.assert_close(gm(x, ends), want, rtol=2**-6, atol=2**-6)


class OtherTokens(Experts):
    """gate and up of other rows: two kernels."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        y = grouped_mm(x, self.gate.transpose(-2, -1), offs=ends)
        z = grouped_mm(x, self.up.mT, offs=ends.flip(0).cumsum(0).to(torch.int32))
        return silu(y) * z


class Transposed(nn.Module):
    """A weight that lies as the operator takes it, [E, K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, K, N))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(x, self.weight, offs=ends)


def test_experts_of_other_tokens_stay_apart() -> None:
    text = "grouped 4 96x64 bf16 int8[halves64]"
    assert texts(lowered(made(OtherTokens), "int8", "here")) == [text, f"{text} -> mul(silu(y0),e0)"]


def test_a_weight_that_lies_transposed() -> None:
    assert texts(lowered(made(Transposed), "int8", "here")) == ["grouped 4 96x64 bf16 int8[halves64]"]
    model, x = made(Transposed), tokens(2, 2, 7, 10)
    with torch.inference_mode():
        want = model(*x)
        bf.quantize(model, "int8", target="reference", example_inputs=x)
        assert model.weight.shape == (E, K, N)
        assert (model(*x) - want).norm() < 0.02 * want.norm()


class Wide(Experts):
    """One product over all tokens for each expert: no rows sorted by expert."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(x.expand(E, *x.shape), self.gate.transpose(-2, -1)).sum(0)


def test_what_no_kernel_takes_is_said_and_decoded() -> None:
    with pytest.warns(UserWarning, match="rows of x .M, K., sorted by expert"):
        gm = lowered(made(Wide), "int8", "here")
    assert texts(gm) == []
    x = tokens(2, 2, 7, 10)
    with torch.inference_mode():
        assert torch.equal(gm(*x), lowered(made(Wide), "int8", "reference")(*x))


class Routed(nn.Module):
    """A router, which no experts' kernel is, in front of experts; the loop over tokens is on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(K, E)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        weight, which = self.router(x).softmax(-1).topk(1)
        order = which[:, 0].argsort(stable=True)
        ends = nn.functional.one_hot(which[:, 0], E).sum(0).cumsum(0).to(torch.int32)
        y = self.experts(x[order], ends)
        return x + torch.zeros_like(x).index_copy(0, order, y) * weight


def test_quantized_saved_and_loaded_as_modules(tmp_path: Path) -> None:
    model, x = made(Routed), tokens(9)[0]
    with torch.inference_mode():
        whole = model(x)
        bf.quantize(model, "int8", target="reference", example_inputs=x)
        want = model(x)
        assert not torch.equal(want, whole) and (want - whole).norm() < 0.05 * whole.norm()
        bf.save(model, tmp_path / "m.safetensors")
        again = bf.load(tmp_path / "m.safetensors", into=made(Routed))
        assert torch.equal(again(x), want)
    assert model.experts.gate.shape == (E, N, K) and model.experts.gate.dtype == torch.bfloat16
    assert isinstance(model.experts, Folded)


@pytest.mark.parametrize("target", ["reference", pytest.param("cpu", marks=pytest.mark.slow)])
def test_compiled(target: str) -> None:
    model, x = made(Routed), tokens(9)[0]
    fast = torch.compile(model, backend="bitfold", options={"recipe": "int8", "target": target})
    with torch.inference_mode():
        y = fast(x)
        bf.quantize(model, "int8", target="reference")
        torch.testing.assert_close(y, model(x), rtol=2**-6, atol=2**-6)


def test_ends_that_are_none_are_refused() -> None:
    spec = GemmSpec.parse("grouped 4 96x64 bf16 int8[halves64]")
    parts = spec.weight.quantize(torch.randn(E, N, K)).parts
    x = torch.randn(10, K, dtype=torch.bfloat16)
    for ends in (torch.tensor([2, 7, 10], dtype=torch.int32), torch.tensor([2, 2, 7, 10])):
        with pytest.raises(CodegenError, match=r"int32 \[4\]"):
            check(spec, [x, ends, *parts])


@pytest.mark.slow
def test_a_mixture_of_transformers() -> None:
    """Its products of experts are kernels, in the graph of the whole model."""
    config = pytest.importorskip("transformers").Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        vocab_size=64, use_cache=False,
    )  # fmt: skip
    from transformers import Qwen3MoeForCausalLM

    gm = bf.capture(Qwen3MoeForCausalLM(config).bfloat16().eval(), (torch.randint(0, 64, (1, 7)),))
    bf.Pipeline.parse("annotate{recipe=int8},fold,fuse,lower{target=here}").run(gm)
    inline(gm)
    assert [text for text in texts(gm) if text.startswith("grouped")] == [
        "grouped 4 192x64 bf16 int8[halves64]",
        "grouped 4 64x96 bf16 int8[halves32]",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("recipe", ["int4[g32]", "int8", "mxfp4", "int8_dynamic", "fp8_dynamic"])
def test_on_a_gpu_experts_are_the_reference_within_rounding(recipe: str) -> None:
    model = made().cuda()
    fast = torch.compile(made().cuda(), backend="bitfold", options={"recipe": recipe})
    with torch.inference_mode():
        x, ends = (tensor.cuda() for tensor in tokens(2, 2, 7, 10))
        bf.quantize(model, recipe, target="reference", example_inputs=(x, ends))
        for last in ((2, 2, 7, 10), (0, 200, 200, 300)):
            x, ends = (tensor.cuda() for tensor in tokens(*last))
            wanted, found = model(x, ends).double(), fast(x, ends).double()
            # Three bf16 roundings on the way (2**-9 each); with 8-bit activations one may fall the other way.
            assert (found - wanted).norm() < (0.02 if "dynamic" in recipe else 3 * 2.0**-9) * wanted.norm()
