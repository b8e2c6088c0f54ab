"""One model through the three scopes: codes, scales and the reference target's outputs bit for bit."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import bitfold as bf
from bitfold.passes import Trace
from bitfold.passes.stages import find_attribute


class Model(nn.Module):
    """Every kind of layer that is quantized, one weight tied, one linear that runs twice."""

    def __init__(self, runs: int = 2) -> None:
        super().__init__()
        self.runs = runs
        self.embed = nn.Embedding(48, 64)
        self.mix = nn.Conv1d(64, 64, 3, padding=1)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.lm_head = nn.Linear(64, 48, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        for _ in range(self.runs):
            x = x + self.down(torch.relu(self.up(x)))
        return self.lm_head(x)


TOKENS = torch.arange(12).reshape(3, 4)


def parts_of(gm: GraphModule) -> dict[str, list[Tensor]]:
    """Codes and scales that a folded graph holds, by format and first part's shape."""
    from bitfold.lowering.install import weight_parts

    return {
        f"{text} {list(find_attribute(gm, names[0]).shape)}": [find_attribute(gm, name) for name in names]
        for names, text, _ in weight_parts(gm)
    }


def by_module(model: nn.Module, recipe: object) -> tuple[Tensor, dict[str, list[Tensor]]]:
    quantized = bf.quantize(copy.deepcopy(model), recipe, target="reference")
    out: dict[str, list[Tensor]] = {}
    for module in quantized.modules():
        for weight in getattr(module, "folded_weights", ()):
            held = [getattr(module, part).detach() for part in weight.parts]
            out[f"{weight.format} {list(held[0].shape)}"] = held
    return quantized(TOKENS), out


def by_program(model: nn.Module, recipe: object) -> tuple[Tensor, dict[str, list[Tensor]]]:
    gm = bf.quantize(
        copy.deepcopy(model), recipe, scope="program", example_inputs=(TOKENS,), target="reference"
    )
    return gm(TOKENS), parts_of(gm)


def by_frame(model: nn.Module, recipe: object) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The codes are those that the backend's graph is called with; they are found in its store of weights."""
    from bitfold.formats import Format

    made: dict[str, list[Tensor]] = {}
    quantize = Format.quantize

    def noted(self: Format, x: Tensor, params: object = None) -> object:
        codes = quantize(self, x, params)
        if not isinstance(x, torch._subclasses.FakeTensor) and x.ndim == 2:  # weights; activations have 3
            made[f"{self} {list(codes.codes.shape)}"] = codes.parts
        return codes

    traces: list[Trace] = []
    Format.quantize = noted  # type: ignore[method-assign]
    try:
        torch._dynamo.reset()
        options = {"recipe": recipe, "target": "reference", "trace": traces}
        compiled = torch.compile(copy.deepcopy(model), backend="bitfold", options=options, fullgraph=True)
        with torch.inference_mode():
            out = compiled(TOKENS)
    finally:
        Format.quantize = quantize  # type: ignore[method-assign]
    assert len(traces) == 1
    return out, made


@pytest.mark.parametrize(
    "recipe",
    [
        "int8_all",
        "int4[g32]",
        "uint4[g64,zero]",
        "mxfp4",
        "nvfp4",
        "int8_conv",
        "int8_dynamic",
        "fp8_dynamic",
    ],
)
def test_codes_and_outputs_are_equal_in_all_scopes(recipe: str) -> None:
    torch.manual_seed(1)
    model = Model().eval()
    with torch.no_grad():
        module, program, frame = (scope(model, recipe) for scope in (by_module, by_program, by_frame))
    for other in (program, frame):
        assert set(other[1]) == set(module[1])
        for name, parts in module[1].items():
            for ours, theirs in zip(parts, other[1][name], strict=True):
                assert ours.dtype == theirs.dtype and torch.equal(
                    ours.view(torch.uint8), theirs.view(torch.uint8)
                )
        assert torch.equal(other[0], module[0])
    assert not torch.equal(module[0], model(TOKENS))


def test_calibrated_ranges_are_equal_too() -> None:
    torch.manual_seed(1)
    # A layer that runs twice has one range as a module, and one for each run in a program.
    model = Model(runs=1).eval()
    batches = [TOKENS, TOKENS + 20]
    options = {"calibration": batches, "target": "reference"}
    with torch.no_grad():
        gm = bf.quantize(
            copy.deepcopy(model), "int8_static", scope="program", example_inputs=(TOKENS,), **options
        )
        bf.quantize(model, "int8_static", **options)
        assert torch.equal(gm(TOKENS + 9), model(TOKENS + 9))


FORMATS = st.sampled_from(
    ["int8", "int4[g32]", "int3[g16]", "uint5[g32,zero]", "float6_e3m2[g32]", "mxfp8", "nf4[g16]"]
)


@settings(max_examples=8)
@given(FORMATS, st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 9))
def test_random_models(text: str, depth: int, width: int, bias: bool, batch: int) -> None:
    torch.manual_seed(depth * 100 + width)
    layers = [nn.Linear(32 * width, 32 * width, bias=bias) for _ in range(depth)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.SiLU()))).eval()
    x = torch.randn(batch, 32 * width)
    gm = bf.quantize(
        copy.deepcopy(model),
        text,
        scope="program",
        example_inputs=(torch.randn(3, 32 * width),),
        dynamic="batch",
        target="reference",
    )
    bf.quantize(model, text, target="reference")
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))
