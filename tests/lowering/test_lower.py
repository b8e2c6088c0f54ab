"""Targets, who takes which region, and what `lower` makes of the graph and of the weights' memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import bitfold as bf
from bitfold.formats import Format, Layout, layout_named
from bitfold.lowering import Target, default_target, get_target, register_target, target_names
from bitfold.lowering import target as targets
from bitfold.lowering.lower import Lower
from bitfold.lowering.partition import partition
from bitfold.passes import Miss, Stage, find_pass, snapshot, state
from bitfold.passes.fuse import inline, region_of
from bitfold.passes.stages import find_attribute


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64, 64)
        self.head = nn.Linear(64, 48, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.relu(self.fc(x)))


TOKENS = torch.arange(12).reshape(3, 4)
LOWERED = """\
rows_default = bitfold.rows.default([head_codes, head_scales], F, 64, tokens)
getitem: u8[3, 4, 32] = getitem(rows_default, 0)
getitem_1: bf16[3, 4, 2] = getitem(rows_default, 1)
dequantize_default: f32[3, 4, 64] = bitfold.dequantize.default([getitem, getitem_1], F, 64, f32)
transpose: f32[3, 64, 4] = aten.transpose.int(dequantize_default, 1, 2)
conv_dequantized_1: f32[64, 192] = bitfold.dequantize.default([conv_codes, conv_scales], F, 192, f32)
reshape_2: f32[64, 64, 3] = aten.reshape.default(conv_dequantized_1, [64, 64, 3])
conv1d_1: f32[3, 64, 4] = aten.conv1d.default(transpose, reshape_2, conv_bias, [1], [1])
transpose_1: f32[3, 4, 64] = aten.transpose.int(conv1d_1, 1, 2)
fused_default = bitfold.fused.default([transpose_1, fc_codes, fc_scales, fc_bias], 'linear 64x64 f32 F bias')
getitem_2: f32[3, 4, 64] = getitem(fused_default, 0)
relu_1: f32[3, 4, 64] = aten.relu.default(getitem_2)
fused_default_1 = bitfold.fused.default([relu_1, head_codes, head_scales], 'linear 48x64 f32 F')
getitem_3: f32[3, 4, 48] = getitem(fused_default_1, 0)"""

ALL = '{"name": "all", "rules": [{"op": "*", "weight": "int4[g32]"}]}'


def folded(recipe: str = ALL) -> tuple[GraphModule, Tensor]:
    """A graph at stage folded, and what it computes."""
    gm = bf.capture(Net().eval(), (TOKENS,))
    bf.Pipeline([find_pass("annotate")(recipe=recipe), find_pass("fold")()]).run(gm)
    with torch.inference_mode():
        return gm, gm(TOKENS)


def fused(recipe: str = ALL) -> tuple[GraphModule, Tensor]:
    gm, expected = folded(recipe)
    bf.Pipeline.parse("fuse").run(gm)
    return gm, expected


@pytest.fixture
def linears_only() -> Iterator[type[Target]]:
    class LinearsOnly(Target):
        name = "linears_only"

        def supports(self, region: GraphModule) -> bool | Miss:
            found = region.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
            return bool(found) or Miss("only linears")

        def lower(self, region: GraphModule) -> GraphModule:
            return region

        def layout(self, format: Format, k: int) -> Layout:
            return layout_named("bytes")

    register_target(LinearsOnly)
    yield LinearsOnly
    del targets._registered["linears_only"]


def test_the_cpu_target_rewrites_linears_and_lookups() -> None:
    gm, expected = fused()
    trace = bf.Pipeline.parse("lower{target=cpu}").run(gm)
    assert trace.steps[-1].rewrites == 4
    assert state(gm).stage is Stage.lowered
    inline(gm)
    gm.recompile()
    shown = [str(node) for node in snapshot(gm) if node.op == "call_function"]
    short = {"'int4[g32,planar64]'": "F", "int4[g32,planar64]": "F", "_weight": ""}
    text = "\n".join(shown)
    for long, brief in short.items():
        text = text.replace(long, brief)
    assert text == LOWERED
    with torch.inference_mode():
        torch.testing.assert_close(gm(TOKENS), expected)


def test_the_reference_target_changes_nothing() -> None:
    gm, expected = fused()
    before = str(snapshot(gm))
    bf.Pipeline.parse("lower{target=reference}").run(gm)
    assert str(snapshot(gm)) == before
    with torch.inference_mode():
        assert torch.equal(gm(TOKENS), expected)


def test_every_reader_of_a_tied_weight_gets_the_new_layout_and_the_old_codes_go() -> None:
    gm, _ = fused()
    old = weakref.ref(find_attribute(gm, "head_weight_codes"))
    bf.Pipeline.parse("lower").run(gm)
    gc.collect()
    assert old() is None
    texts = [
        argument
        for call in gm.graph.nodes
        if (region := region_of(gm, call)) is not None
        for node in region.graph.nodes
        for argument in node.args
        if isinstance(argument, str)
    ]
    kernels = {"linear 64x64 f32 int4[g32,planar64] bias", "linear 48x64 f32 int4[g32,planar64]"}
    # A convolution keeps its dequantize, in the layout that the target has for it.
    assert set(texts) - kernels == {"int4[g32,planar64]"} and kernels < set(texts)


LEFT = r"2 of 4 regions stay on reference operators, .* linears_only: only linears"


def test_what_no_target_takes_stays_loudly(linears_only: type[Target]) -> None:
    gm, expected = fused()
    with pytest.warns(UserWarning, match=LEFT):
        bf.Pipeline.parse("lower{target=linears_only}").run(gm)
    assert [miss.reason for miss in state(gm).misses] == ["linears_only: only linears"] * 2
    with torch.inference_mode():
        assert torch.equal(gm(TOKENS), expected)


def test_the_first_target_that_takes_a_region_gets_it(linears_only: type[Target]) -> None:
    gm, expected = fused()
    found = partition(gm, [linears_only(), get_target("cpu")])
    assert [target.name for target in found.taken.values()] == ["cpu", "cpu", "linears_only", "linears_only"]
    assert not found.left
    bf.Pipeline.parse('lower{target="linears_only,cpu"}').run(gm)
    with torch.inference_mode():
        assert torch.equal(gm(TOKENS), expected)


def test_a_block_of_rows_is_looked_up_in_the_decoded_table() -> None:
    gm, expected = fused('{"name": "b", "rules": [{"op": "embedding", "weight": "int8[16x64]"}]}')
    bf.Pipeline.parse("lower").run(gm)
    inline(gm)
    gm.recompile()
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    with torch.inference_mode():
        assert torch.equal(gm(TOKENS), expected)


@pytest.mark.parametrize(
    "text", ["int8", "int8[tensor]", "int4[g32]", "nvfp4", "q4_1", "int3[g32]", "mxfp6_e2m3"]
)
def test_rows_of_codes_decode_to_rows_of_the_table(text: str) -> None:
    q = bf.format(text).quantize(torch.randn(40, 96))
    for given in (7, [[3, 39], [0, 3]], [[], []]):
        indices = torch.tensor(given, dtype=torch.int64)
        parts = torch.ops.bitfold.rows(q.parts, text, 96, indices)
        found = torch.ops.bitfold.dequantize(parts, text, 96, torch.float32)
        assert torch.equal(found, q.dequantize()[indices])


def test_eager_cpu_linear_is_the_library_product() -> None:
    q = bf.format("int4[g32]").quantize(torch.randn(40, 96))
    x, bias = torch.randn(2, 3, 96), torch.randn(40)
    found = torch.ops.bitfold.cpu_linear(x, q.parts, "int4[g32]", 96, bias)
    assert torch.equal(found, nn.functional.linear(x, q.dequantize(), bias))


def test_autocast_gives_the_same_dtype_compiled_or_not() -> None:
    q, x = bf.format("int8").quantize(torch.randn(40, 96)), torch.randn(3, 96)

    def call(x: Tensor) -> Tensor:
        return torch.ops.bitfold.cpu_linear(x, q.parts, "int8", 96)

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert call(x).dtype == torch.bfloat16
        assert torch.compile(call, backend="aot_eager")(x).dtype == torch.bfloat16


@pytest.mark.parametrize("compiled", [False, True])
def test_cpu_linear_has_gradients(compiled: bool) -> None:
    q, x = bf.format("int8").quantize(torch.randn(40, 96)), torch.randn(3, 96, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return torch.ops.bitfold.cpu_linear(x, q.parts, "int8", 96)

    (torch.compile(call, backend="aot_eager") if compiled else call)(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, q.dequantize().sum(0).expand(3, 96), atol=1e-5)


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(bf.BitfoldError, match="there is no target 'cdua'; did you mean 'cuda'"):
        get_target("cdua")
    with pytest.raises(bf.BitfoldError, match="there is no target 'gpu'"):
        bf.Pipeline([Lower(target="gpu")]).run(fused()[0])
    assert {"cpu", "cuda", "reference"} <= set(target_names())
    found = [default_target(torch.device(kind)) for kind in ("cpu", "cuda", "meta")]
    assert found == ["cpu", "cuda", "reference"]


def test_a_name_is_given_once(linears_only: type[Target]) -> None:
    class Other(linears_only):  # type: ignore[misc, valid-type]
        pass

    with pytest.raises(bf.BitfoldError, match="a target named 'linears_only' exists already"):
        register_target(Other)
    with pytest.raises(bf.BitfoldError, match=r"is a subclass of bitfold.Target"):
        register_target(nn.Linear)  # type: ignore[type-var]


def test_a_weight_elsewhere_is_a_miss() -> None:
    gm, _ = fused()
    region = next(region for node in gm.graph.nodes if (region := region_of(gm, node)) is not None)
    answer = get_target("cuda").supports(region)
    assert not answer
    assert isinstance(answer, Miss)
    assert answer.reason.endswith("is on cpu, and the target cuda runs on cuda")
