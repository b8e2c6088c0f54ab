"""Fuse: what joins a region and what does not, in whole graphs; `inline` is its inverse; no bit changes."""

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from bitfold.passes import (
    Annotate,
    Fold,
    Fuse,
    Pipeline,
    Recipe,
    Region,
    Rule,
    capture,
    inline,
    region_of,
    snapshot,
    verify,
)
from bitfold.passes.stages import Stage


def fused(
    model: nn.Module, *inputs: Tensor, recipe: str | Recipe = "int8", epilogue: bool = True
) -> GraphModule:
    gm = capture(model, inputs)
    Pipeline([Annotate(recipe), Fold(), Fuse(epilogue)]).run(gm)
    return gm


def text(gm: GraphModule) -> list[str]:
    return str(snapshot(gm)).splitlines()


def bodies(gm: GraphModule) -> dict[str, Region]:
    return {
        n.name: body.meta["bitfold_region"] for n in gm.graph.nodes if (body := region_of(gm, n)) is not None
    }


class Block(nn.Module):
    """A gated feed-forward layer with a residual: every kind of epilogue."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 16), nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def test_the_whole_graph_and_a_region() -> None:
    gm = fused(Block(), torch.zeros(2, 8))
    assert text(gm) == [
        "gate_bias: f32[16] = self.gate.bias",
        "down_bias: f32[8] = self.down.bias",
        "x: f32[2, 8] = input",
        "gate_weight_codes: u8[16, 8] = self.gate_weight_codes",
        "gate_weight_scales: f32[16, 1] = self.gate_weight_scales",
        "up_weight_codes: u8[16, 8] = self.up_weight_codes",
        "up_weight_scales: f32[16, 1] = self.up_weight_scales",
        "fused_up: f32[2, 16] = self.fused_up(x, up_weight_codes, up_weight_scales)  # int8 weight",
        "fused_gate: f32[2, 16] = "
        "self.fused_gate(x, gate_weight_codes, gate_weight_scales, gate_bias, fused_up)"
        "  # int8 weight",
        "down_weight_codes: u8[8, 16] = self.down_weight_codes",
        "down_weight_scales: f32[8, 1] = self.down_weight_scales",
        "fused_down: f32[2, 8] = "
        "self.fused_down(fused_gate, down_weight_codes, down_weight_scales, down_bias, x)"
        "  # int8 weight",
        "return (fused_down,)",
    ]
    assert bodies(gm) == {
        "fused_up": Region("linear", ("int8",)),
        "fused_gate": Region("linear", ("int8",), (), ("aten::silu", "aten::mul")),
        "fused_down": Region("linear", ("int8",), (), ("aten::add",)),
    }
    assert text(gm.fused_gate) == [
        "x: f32[2, 8] = input",
        "gate_weight_codes: u8[16, 8] = input",
        "gate_weight_scales: f32[16, 1] = input",
        "gate_bias: f32[16] = input",
        "linear_1: f32[2, 16] = input",
        "gate_weight_dequantized: f32[16, 8] = "
        "bitfold.dequantize.default([gate_weight_codes, gate_weight_scales], 'int8', 8, f32)",
        "linear: f32[2, 16] = aten.linear.default(x, gate_weight_dequantized, gate_bias)  # int8 weight",
        "silu: f32[2, 16] = aten.silu.default(linear)",
        "mul: f32[2, 16] = aten.mul.Tensor(silu, linear_1)",
        "return mul",
    ]


def test_an_activation_that_one_layer_reads_is_quantized_inside() -> None:
    gm = fused(nn.Sequential(nn.Linear(8, 4)), torch.zeros(2, 8), recipe="int8_dynamic")
    assert bodies(gm) == {"fused_0": Region("linear", ("int8", "int8"), ("bitfold::quantize",), ())}
    assert text(gm)[-2].startswith("fused_0: f32[2, 4] = self.fused_0(input_1, ")


def test_an_activation_that_two_layers_read_is_quantized_once_outside() -> None:
    gm = fused(Block(), torch.zeros(2, 8), recipe="int8_dynamic")
    assert bodies(gm)["fused_gate"].prologue == bodies(gm)["fused_up"].prologue == ()
    assert bodies(gm)["fused_gate"].formats == ("int8", "int8")
    assert sum("bitfold.quantize" in line for line in text(gm)) == 1
    assert not any("dequantize" in line for line in text(gm))


def test_tied_weights_are_read_by_both_regions() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.embed(tokens) * 2.0, self.embed.weight)

    gm = fused(Tied(), torch.tensor([[1, 2]]), recipe="int8_all")
    assert text(gm) == [
        "tokens: i64[1, 2] = input",
        "embed_weight_codes: u8[6, 8] = self.embed_weight_codes",
        "embed_weight_scales: f32[6, 1] = self.embed_weight_scales",
        "fused_embed: f32[1, 2, 8] = "
        "self.fused_embed(embed_weight_codes, embed_weight_scales, tokens)  # int8 weight",
        "fused_embed_1: f32[1, 2, 6] = "
        "self.fused_embed_1(fused_embed, embed_weight_codes, embed_weight_scales)  # int8 weight",
        "return (fused_embed_1,)",
    ]
    assert bodies(gm)["fused_embed"].epilogue == ("aten::mul",)


class Limits(nn.Module):
    """What an epilogue must not take."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        y = self.fc(x)
        match self.case:
            case "read twice":
                return (y * torch.relu(y),)
            case "another shape":
                return (y.unsqueeze(0) + other,)
            case "grown by broadcasting":
                return (y + other,)
            case "an output too":
                return y, torch.relu(y)
            case "not pointwise":
                return (torch.softmax(y, -1),)
            case "written to in between":
                other = other.clone()
                z = other.sum()
                other.add_(1.0)
                return torch.relu(y) + other[0], z
        raise AssertionError(self.case)


@pytest.mark.parametrize(
    "case",
    [
        "read twice",
        "another shape",
        "grown by broadcasting",
        "an output too",
        "not pointwise",
        "written to in between",
    ],
)
def test_an_epilogue_stops_where_it_must(case: str) -> None:
    model, inputs = Limits(case), (torch.randn(2, 8), torch.randn(3, 2, 4))
    gm = fused(model, *inputs)
    assert list(bodies(gm).values()) == [Region("linear", ("int8",))]
    plain = capture(model, inputs)
    Pipeline([Annotate("int8"), Fold()]).run(plain)
    for ours, theirs in zip(gm(*inputs), plain(*inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_an_input_that_is_written_after_the_anchor_is_read_before() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.fc(x)
            x.mul_(0.0)
            return torch.relu(y) + x

    x = torch.randn(2, 8)
    gm = fused(Net(), x, recipe="int8_dynamic")
    plain = capture(Net(), (x,))
    assert bodies(gm) == {"fused_fc": Region("linear", ("int8", "int8"), ("bitfold::quantize",))}
    assert gm(x).abs().max() > 0 and plain(x) is not None


def test_the_epilogue_can_be_left_out() -> None:
    gm = capture(Block(), (torch.zeros(2, 8),))
    Pipeline.parse("annotate,fold,fuse{epilogue=false}").run(gm)
    assert all(region.epilogue == () for region in bodies(gm).values())


def test_a_layer_without_codes_is_no_region() -> None:
    recipe = Recipe("one", (Rule("gate", weight="int8"),))
    assert list(bodies(fused(Block(), torch.zeros(2, 8), recipe=recipe))) == ["fused_gate"]


def test_convolutions_embeddings_and_batches_are_anchors() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.conv = nn.Conv2d(1, 2, 3)
            self.experts = nn.Parameter(torch.randn(2, 3, 3))

        def forward(self, tokens: Tensor) -> Tensor:
            x = torch.relu(self.conv(self.embed(tokens).unsqueeze(1)))
            return torch.bmm(x.squeeze(-1)[:, :, :3] if x.shape[-1] == 1 else x[..., 0], self.experts)

    gm = fused(
        Net(), torch.zeros(2, 5, dtype=torch.int64), recipe=Recipe("all", (Rule(op="*", weight="int8"),))
    )
    assert bodies(gm) == {
        "fused_embed": Region("embedding", ("int8",)),
        "fused_conv": Region("conv2d", ("int8",), (), ("aten::relu",)),
        "fused_experts": Region("bmm", ("int8",)),
    }


def test_attention_with_quantized_operands_is_an_anchor() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v)

    recipe = Recipe("kv", (Rule("re:k|v", output="int8"),))
    gm = capture(Net(), (torch.randn(1, 3, 8),))
    Pipeline([Annotate(recipe), Fold()]).run(gm)
    expected = gm(x := torch.randn(1, 3, 8))
    Pipeline([Fuse()]).run(gm)
    assert [region.anchor for region in bodies(gm).values()] == ["attention"]
    assert torch.equal(gm(x), expected)


def test_inline_puts_every_region_back() -> None:
    model, x = Block(), torch.randn(2, 8)
    folded = capture(model, (x,))
    Pipeline([Annotate("int8_dynamic"), Fold()]).run(folded)
    expected = folded(x)
    gm = fused(model, x, recipe="int8_dynamic")
    assert torch.equal(gm(x), expected)
    assert inline(gm) == 3
    gm.recompile()
    verify(gm, Stage.folded)
    assert torch.equal(gm(x), expected)
    assert not list(gm.children()) or not bodies(gm)
    # What the regions had copied of shared operands is all that has been added.
    assert sorted({line.split(" = ")[1].split("(")[0] for line in text(gm)[:-1]}) == sorted(
        {line.split(" = ")[1].split("(")[0] for line in text(folded)[:-1]}
    )


@settings(max_examples=12)
@given(
    st.lists(
        st.sampled_from(["linear", "relu", "add", "mul", "write", "norm", "save"]), min_size=2, max_size=8
    )
)
def test_random_graphs_keep_every_bit(steps: list[str]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in steps)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            saved = x
            for step, layer in zip(steps, self.layers, strict=True):
                match step:
                    case "linear":
                        x = layer(x)
                    case "relu":
                        x = torch.relu(x)
                    case "add":
                        x = x + saved
                    case "mul":
                        x = x * layer(saved)
                    case "write":
                        saved.mul_(0.5)
                    case "norm":
                        x = F.layer_norm(x, (8,))
                    case "save":
                        saved = x
            return x

    model, x = Net(), torch.randn(3, 8)
    plain = capture(model, (x,))
    Pipeline([Annotate("int8_dynamic"), Fold()]).run(plain)
    gm = fused(model, x, recipe="int8_dynamic")
    assert torch.equal(gm(x), plain(x))
    assert regions_are_convex(plain, gm)


def regions_are_convex(folded: GraphModule, gm: GraphModule) -> bool:
    """Whether no path of the folded graph leaves a region of `gm` and comes back: drawn together, the regions
    leave a graph without cycles. What several regions have a copy of stands alone."""
    inside: dict[str, set[str]] = {}
    for call in gm.graph.nodes:
        body = region_of(gm, call)
        for node in body.graph.nodes if body is not None else ():
            if node.op == "call_function":
                inside.setdefault(node.name, set()).add(call.name)
    place = {name: min(regions) for name, regions in inside.items() if len(regions) == 1}
    drawn = nx.DiGraph()
    for node in folded.graph.nodes:
        drawn.add_node(place.get(node.name, node.name))
        for user in node.users:
            ends = [place.get(end.name, end.name) for end in (node, user)]
            if ends[0] != ends[1]:
                drawn.add_edge(*ends)
    return nx.is_directed_acyclic_graph(drawn)


def test_a_region_that_is_not_convex_would_be_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y.relu() + F.layer_norm(y, (8,))

    folded = capture(Net(), (torch.zeros(2, 8),))
    Pipeline([Annotate("int8"), Fold()]).run(folded)
    gm = fused(Net(), torch.zeros(2, 8))
    assert regions_are_convex(folded, gm)
    body = gm.fused_fc.graph
    with body.inserting_before(body.output_node()):  # as if relu and add had joined, past the layer norm
        for name in ("relu", "add"):
            body.create_node("call_function", torch.ops.aten.relu.default, (), name=name)
    assert not regions_are_convex(folded, gm)
