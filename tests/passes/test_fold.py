"""Fold: the reference form, in whole graphs; tied weights once; memory given back; equal in all scopes."""

import gc
import time
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import bitfold.passes.fold as fold_module
from bitfold.formats import BitfoldError, Quantized, format
from bitfold.passes import (
    Annotate,
    Pipeline,
    Recipe,
    Rule,
    add_constant,
    call,
    capture,
    capture_frame,
    capture_module,
    example_for,
    fake_mode,
    find_pass,
    snapshot,
    state,
)
from bitfold.passes.stages import Stage


def everything(weight: str, **options: str) -> Recipe:
    return Recipe("everything", (Rule(op="*", weight=weight, **options),))


def folded(model: nn.Module, inputs: Tensor, recipe: str | Recipe, dynamic: str | None = None) -> GraphModule:
    gm = capture(model, (inputs,), dynamic=dynamic)
    Pipeline([Annotate(recipe), find_pass("fold")()]).run(gm)
    return gm


def text(gm: GraphModule) -> list[str]:
    return str(snapshot(gm)).splitlines()


def test_a_linear() -> None:
    gm = capture(nn.Linear(8, 4), (torch.zeros(2, 8),))
    trace = Pipeline.parse("annotate{recipe=int4[g4]},fold").run(gm)
    assert [step.rewrites for step in trace.steps] == [0, 1, 1]
    assert text(gm) == [
        "bias: f32[4] = self.bias",
        "input_1: f32[2, 8] = input",
        "weight_codes: u8[4, 4] = self.weight_codes",
        "weight_scales: bf16[4, 2] = self.weight_scales",
        "weight_dequantized: f32[4, 8] = "
        "bitfold.dequantize.default([weight_codes, weight_scales], 'int4[g4]', 8, f32)",
        "linear: f32[2, 4] = aten.linear.default(input_1, weight_dequantized, bias)  # int4[g4] weight",
        "return (linear,)",
    ]
    assert [name for name, _ in gm.named_parameters()] == ["bias"]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x)


def test_an_activation_is_quantized_once_for_all_that_read_it() -> None:
    assert text(folded(Pair(), torch.zeros(2, 8), "int8_dynamic", dynamic="batch")) == [
        "x: f32[s77, 8] = input",
        "q_input_quantized = bitfold.quantize.default(x, 'int8')",
        "q_input_codes: u8[s77, 8] = getitem(q_input_quantized, 0)",
        "q_input_scales: f32[s77, 1] = getitem(q_input_quantized, 1)",
        "q_input_dequantized: f32[s77, 8] = "
        "bitfold.dequantize.default([q_input_codes, q_input_scales], 'int8', 8, f32)",
        "q_weight_codes: u8[4, 8] = self.q_weight_codes",
        "q_weight_scales: f32[4, 1] = self.q_weight_scales",
        "q_weight_dequantized: f32[4, 8] = "
        "bitfold.dequantize.default([q_weight_codes, q_weight_scales], 'int8', 8, f32)",
        "linear: f32[s77, 4] = aten.linear.default(q_input_dequantized, q_weight_dequantized)"
        "  # int8 weight, int8 input",
        "k_weight_codes: u8[4, 8] = self.k_weight_codes",
        "k_weight_scales: f32[4, 1] = self.k_weight_scales",
        "k_weight_dequantized: f32[4, 8] = "
        "bitfold.dequantize.default([k_weight_codes, k_weight_scales], 'int8', 8, f32)",
        "linear_1: f32[s77, 4] = aten.linear.default(q_input_dequantized, k_weight_dequantized)"
        "  # int8 weight, int8 input",
        "add: f32[s77, 4] = aten.add.Tensor(linear, linear_1)",
        "return (add,)",
    ]


class Written(nn.Module):
    """Writes to an activation between its two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.q(x)
        x.add_(1.0)
        return y + self.k(x)


def test_an_activation_that_is_written_in_between_is_quantized_twice() -> None:
    x = torch.randn(3, 8)
    model = Written()
    gm = folded(model, x, "int8_dynamic")
    assert sum("bitfold.quantize" in line for line in text(gm)) == 2
    # 8 numbers, each to half a step of 1/127 of the largest: far from the 1.0 that a stale value would miss.
    assert torch.allclose(gm(x), model(x), atol=0.2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.lm_head = nn.Linear(8, 6, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.embed(tokens))


def test_tied_weights_are_stored_once() -> None:
    gm = folded(Tied(), torch.tensor([[0, 5]]), "int8_all")
    assert [line.split(" = ")[0] for line in text(gm)] == [
        "tokens: i64[1, 2]",
        "lm_head_weight_codes: u8[6, 8]",
        "lm_head_weight_scales: f32[6, 1]",
        "embed_weight_dequantized: f32[6, 8]",
        "embedding: f32[1, 2, 8]",
        "linear: f32[1, 2, 6]",
        "return (linear,)",
    ]
    assert len(list(gm.buffers())) == 2 and not list(gm.parameters())


class Dresses(nn.Module):
    """Each way in which a weight comes to a matmul or a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.fc = nn.Linear(8, 8)
        self.kn = nn.Parameter(torch.randn(8, 8))
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.conv = nn.Conv1d(8, 4, 2, groups=2)
        self.image = nn.Conv2d(1, 2, 3, padding="same")
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fc(self.embed(tokens)) @ self.kn
        x = torch.einsum("bij,kj->bik", x, self.kn)
        x = torch.addmm(self.bias, x.flatten(0, 1), self.kn.t()).unflatten(0, tokens.shape)
        x = torch.baddbmm(x, torch.bmm(x, self.experts), self.experts)
        return self.conv(x.transpose(1, 2)), self.image(x.unsqueeze(1))


def by_hand(model: Dresses, tokens: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """The same model with each weight rounded by the format, along the dimension that is reduced over."""

    def rounded(weight: Tensor) -> Tensor:
        return format(fmt).fake_quantize(weight.detach().contiguous())

    def experts() -> Tensor:
        return rounded(model.experts.transpose(1, 2)).transpose(1, 2)

    x = F.linear(rounded(model.embed.weight)[tokens], rounded(model.fc.weight), model.fc.bias)
    x = F.linear(x, rounded(model.kn.t()))
    x = F.linear(x, rounded(model.kn))
    x = F.linear(x.flatten(0, 1), rounded(model.kn), model.bias).unflatten(0, tokens.shape)
    x = torch.baddbmm(x, torch.bmm(x, experts()), experts())
    conv = rounded(model.conv.weight.flatten(1)).view_as(model.conv.weight)
    image = rounded(model.image.weight.flatten(1)).view_as(model.image.weight)
    return (
        F.conv1d(x.transpose(1, 2), conv, model.conv.bias, groups=2),
        F.conv2d(x.unsqueeze(1), image, model.image.bias, padding="same"),
    )


@pytest.mark.parametrize("fmt", ["int8", "uint4[zero]", "float6_e3m2[tensor]", "ternary"])
def test_every_dress_is_rounded_along_the_reduced_dimension(fmt: str) -> None:
    model, tokens = Dresses(), torch.randint(0, 10, (3, 4))
    gm = folded(model, tokens, everything(fmt))
    # The experts' weight is read twice, and the square one both ways round: seven different constants.
    assert sum("dequantize" in line and "aten" not in line for line in text(gm)) == 7
    for ours, theirs in zip(gm(tokens), by_hand(model, tokens, fmt), strict=True):
        assert torch.equal(ours, theirs)


class Small(nn.Module):
    """One layer of each kind that the module scope knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.up = nn.Linear(16, 32)
        self.conv = nn.Conv1d(32, 16, 3, padding=1)
        self.lm_head = nn.Linear(16, 32, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.gelu(self.up(self.embed(tokens)))
        return self.lm_head(self.conv(x.transpose(1, 2)).transpose(1, 2))


def constants(gm: GraphModule, prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{name}": held for name, held in gm.named_buffers() if "_codes" in name or "_scales" in name
    }


def in_program(model: nn.Module, x: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], Tensor]:
    gm = folded(model, x, recipe)
    return constants(gm), gm(x)


def in_frame(model: nn.Module, x: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, Tensor] = {}

    def backend(gm: GraphModule, inputs: list[Tensor]) -> GraphModule:
        captured = capture_frame(gm, inputs)
        Pipeline([Annotate(recipe), find_pass("fold")()]).run(captured)
        found.update(constants(captured))
        return captured

    with torch.no_grad():
        return found, torch.compile(model, backend=backend, fullgraph=True)(x)


def in_modules(model: nn.Module, x: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, Tensor] = {}
    replaced = {}
    for path, layer in model.named_modules():
        example = example_for(layer)
        if example is None:
            continue
        gm = capture_module(layer, example, path=path)
        Pipeline([Annotate(recipe), find_pass("fold")()]).run(gm)
        found.update(constants(gm, f"{path}_"))
        replaced[path] = gm

    def run(path: str, value: Tensor) -> Tensor:
        result = replaced[path](value)
        return result[0] if isinstance(result, tuple | list) else result

    hidden = F.gelu(run("up", run("embed", x)))
    return found, run("lm_head", run("conv", hidden.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize(
    "fmt", ["int8", "int4[g16]", "mxfp4", "nf4[g16]", "uint4[zero]", "float8_e4m3fn[tensor]"]
)
def test_codes_scales_and_outputs_are_equal_in_all_three_scopes(fmt: str) -> None:
    model, x = Small().eval(), torch.randint(0, 32, (2, 8))
    recipe = everything(fmt, on_misfit="report")
    program, module, frame = (
        in_program(model, x, recipe),
        in_modules(model, x, recipe),
        in_frame(model, x, recipe),
    )
    assert set(program[0]) == set(module[0]) == set(frame[0])
    assert len(program[0]) == (2 if fmt == "mxfp4" else 8)  # a group of 32 fits the convolution only
    for name, held in program[0].items():
        assert torch.equal(held.view(torch.uint8), module[0][name].view(torch.uint8)), name
        assert torch.equal(held.view(torch.uint8), frame[0][name].view(torch.uint8)), name
    assert torch.equal(program[1], module[1])
    assert torch.equal(program[1], frame[1])


def test_the_frame_scope_leaves_the_parameters_and_asks_the_store() -> None:
    model, x = nn.Linear(8, 4), torch.randn(2, 8)
    before = model.weight.detach().clone()
    asked = []

    class Store:
        def folded(self, parameter, expression, fmt, make) -> Quantized:
            asked.append((parameter is model.weight, expression, fmt))
            return make(parameter)

    def backend(gm: GraphModule, inputs: list[Tensor]) -> GraphModule:
        captured = capture_frame(gm, inputs)
        state(captured).store = Store()
        Pipeline.parse("annotate{recipe=int8},fold").run(captured)
        assert len(captured.graph.find_nodes(op="placeholder")) == len(inputs)
        return captured

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(x)
    assert asked == [(True, "", "int8")]
    assert torch.equal(model.weight, before)


def test_float_weights_are_dropped_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is quantized, the float weights before it are gone already."""
    gm = capture(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))), (torch.zeros(1, 8),))
    weights = [weakref.ref(parameter) for parameter in gm.parameters()]
    alive = []
    original = fold_module._Folder.codes

    def codes(self, *args):
        gc.collect()
        alive.append([weight() is not None for weight in weights])
        return original(self, *args)

    monkeypatch.setattr(fold_module._Folder, "codes", codes)
    Pipeline.parse("annotate{recipe=int8},fold").run(gm)
    assert alive == [[i >= done for i in range(4)] for done in range(4)]


def test_a_weight_that_something_else_reads_stays() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) / self.fc.weight.norm()

    gm = folded(Norm(), torch.zeros(2, 8), "int8")
    assert [name for name, _ in gm.named_parameters()] == ["fc.weight"]


def test_codes_of_a_checkpoint_are_taken_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(32, 8, bias=False))
    gm = capture(model, (torch.zeros(2, 32),))
    given = format("q4_1").quantize(torch.randn(8, 32))
    state(gm).stored = {"0.weight": given}
    Pipeline.parse("annotate{recipe=stored},fold").run(gm)
    held = dict(gm.named_buffers())
    assert list(held) == ["_0_weight_codes", "_0_weight_scales", "_0_weight_zeros"]
    assert all(ours is theirs for ours, theirs in zip(held.values(), given.parts, strict=True))
    x = torch.randn(2, 32)
    assert torch.equal(gm(x), F.linear(x, given.dequantize()))


def test_a_failure_midway_says_how_far_it_came_and_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    expected = folded(model, x, "int8_dynamic")(x)
    gm = capture(model, (x,))
    Pipeline.parse("annotate{recipe=int8_dynamic}").run(gm)
    original = fold_module._Folder.codes

    def codes(self, on, *args):
        if on.layer == "1":
            raise MemoryError("no room")
        return original(self, on, *args)

    with monkeypatch.context() as patched:
        patched.setattr(fold_module._Folder, "codes", codes)
        with pytest.raises(BitfoldError) as caught:
            Pipeline.parse("fold").run(gm)
    assert str(caught.value) == (
        "folding stopped at the weight of layer 1 after 3 of 6 edges: no room; what is before it holds "
        "codes, the rest is float and whole, and running fold again "
        "goes on from there"
    )
    Pipeline.parse("fold").run(gm)
    assert state(gm).stage is Stage.folded
    assert torch.equal(gm(x), expected)


def test_an_activation_with_a_last_dimension_that_varies() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1))
    recipe = Recipe("conv", (Rule(op="conv", weight="int8", input="int8[tensor]"),))
    gm = capture(model, (torch.randn(2, 4, 9),), dynamic=({2: torch.export.Dim.DYNAMIC},))
    Pipeline([Annotate(recipe), find_pass("fold")()]).run(gm)
    assert any("aten.sym_size.int(input_1, 2)" in line for line in text(gm))
    for length in (5, 12):
        x = torch.randn(2, 4, length)
        weight = format("int8").fake_quantize(model[0].weight.detach().flatten(1)).view(4, 4, 3)
        rounded = format("int8[tensor]").fake_quantize(x)
        assert torch.equal(gm(x), F.conv1d(rounded, weight, model[0].bias, padding=1))


def test_weights_in_bfloat16_decode_to_bfloat16() -> None:
    model, x = nn.Linear(16, 8, dtype=torch.bfloat16), torch.randn(2, 16, dtype=torch.bfloat16)
    gm = folded(model, x, "int8_dynamic")
    fmt = format("int8")
    expected = F.linear(fmt.fake_quantize(x), fmt.fake_quantize(model.weight.detach()), model.bias)
    assert gm(x).dtype is torch.bfloat16 and torch.equal(gm(x), expected)


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 4).map(lambda n: 16 * n), min_size=2, max_size=4),
    bias=st.booleans(),
    fmt=st.sampled_from(["int8", "int4[g16]", "uint3[zero]", "mxint8", "float8_e5m2", "int2", "binary"]),
    activation=st.sampled_from(["", "int8", "float8_e4m3fn[tensor]", "int4[g16]"]),
    op=st.sampled_from([torch.relu, torch.tanh, lambda x: x * 2]),
)
def test_random_stacks_fold_to_what_rounding_by_hand_gives(sizes, bias, fmt, activation, op) -> None:
    if fmt == "mxint8":
        sizes = [2 * size for size in sizes]
    layers = [nn.Linear(k, n, bias=bias) for k, n in pairwise(sizes)]

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = op(layer(x))
            return x

    x = torch.randn(3, sizes[0])
    gm = folded(Stack(), x, everything(fmt, input=activation))
    expected = x
    for layer in layers:
        if activation:
            expected = format(activation).fake_quantize(expected)
        expected = op(F.linear(expected, format(fmt).fake_quantize(layer.weight.detach()), layer.bias))
    assert torch.equal(gm(x), expected)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    kinds=st.lists(st.sampled_from(["linear", "bare", "gelu", "norm", "conv"]), min_size=1, max_size=4),
    fmt=st.sampled_from(
        ["int8", "int4[g16]", "uint5[g32,zero]", "mxfp6_e2m3", "nvfp4", "float7_e3m3", "ternary"]
    ),
    activation=st.sampled_from(["", "int8[tensor]", "float8_e5m2[tensor]"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_random_modules_are_equal_in_all_three_scopes(kinds, fmt, activation, dtype) -> None:
    def made(kind: str) -> nn.Module:
        match kind:
            case "linear" | "bare":
                return nn.Linear(32, 32, bias=kind == "linear")
            case "conv":
                return nn.Conv1d(8, 8, 4, padding="same")
            case "norm":
                return nn.LayerNorm(32)
        return nn.GELU()

    torch._dynamo.reset()
    model = nn.Sequential(nn.Embedding(16, 32), *map(made, kinds)).to(dtype)
    tokens, recipe = torch.randint(0, 16, (3, 8)), everything(fmt, input=activation)
    program, frame = in_program(model, tokens, recipe), in_frame(model, tokens, recipe)
    codes, value = {}, tokens
    for path, layer in model.named_children():
        example = example_for(layer)
        if example is None:
            value = layer(value)
            continue
        gm = capture_module(layer, example, path=path)
        Pipeline([Annotate(recipe), find_pass("fold")()]).run(gm)
        codes.update(constants(gm, f"_{path}_"))
        result = gm(value)
        value = result[0] if isinstance(result, tuple | list) else result
    assert set(program[0]) == set(frame[0]) == set(codes)
    for name, held in program[0].items():
        assert torch.equal(held.view(torch.uint8), frame[0][name].view(torch.uint8))
        assert torch.equal(held.view(torch.uint8), codes[name].view(torch.uint8))
    assert torch.equal(program[1], frame[1]) and torch.equal(program[1], value)


def stack(layers: int) -> GraphModule:
    """linear, relu, linear, relu, ..., built node by node: capturing thousands of them takes minutes."""
    gm = GraphModule(nn.Module(), Graph())
    mode = fake_mode(gm)
    x = gm.graph.placeholder("x")
    x.meta["val"] = mode.from_tensor(torch.zeros(2, 8), static_shapes=True)
    out = gm.graph.output((x,))
    for i in range(layers):
        weight = add_constant(gm, f"w{i}", nn.Parameter(torch.randn(8, 8)), like=out)
        x = call(gm, torch.ops.aten.linear.default, (x, weight), before=out, origin_from=weight)
        x = call(gm, torch.ops.aten.relu.default, (x,), before=out, origin_from=weight)
    out.args = ((x,),)
    return gm


def test_the_passes_take_time_linear_in_the_nodes() -> None:
    def seconds(layers: int) -> float:
        gm = stack(layers)
        started = time.process_time()
        for step in Pipeline.parse("annotate{recipe=int8_dynamic},fold,fuse").passes:
            step.apply(gm)
            state(gm).stage = step.produces
        return time.process_time() - started

    seconds(10)
    # Eight times the nodes: work that is quadratic in them would take 64 times as long.
    assert seconds(400) < 24 * seconds(50)
