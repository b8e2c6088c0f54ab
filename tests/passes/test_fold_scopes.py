"""Folded in all three scopes: the same codes, scales and outputs; the user's parameters are left alone."""

import pytest
import torch
import torch.nn.functional as F
from fold_cases import constants, everything, in_frame, in_program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from bitfold.formats import Quantized
from bitfold.passes import (
    Annotate,
    Pipeline,
    Recipe,
    capture_frame,
    capture_module,
    example_for,
    find_pass,
    state,
)


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
