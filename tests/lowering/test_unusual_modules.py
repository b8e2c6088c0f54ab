"""Modules that do unusual things with their weights, their forward or their names: right, or said."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf
from bitfold.passes.rules import Rule


class Own(nn.Module):
    """One square weight, and whatever forward a test gives it."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 32)) if weight is None else weight
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.w)


def rounded(weight: Tensor) -> Tensor:
    return bf.format("int8").fake_quantize(weight.detach().contiguous())


def through_a_file(model: nn.Module, skeleton: nn.Module, tmp_path: Path) -> nn.Module:
    bf.save(model, tmp_path / "model.safetensors")
    loaded = bf.load(tmp_path / "model.safetensors", into=skeleton, target="reference")
    assert isinstance(loaded, nn.Module)
    return loaded


def test_a_parameter_read_as_weight_and_as_float(tmp_path: Path) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) + w[0] * 100

    model, x = Own(run), torch.randn(2, 32)
    w = model.w.detach().clone()
    expected = F.linear(x, rounded(w)) + w[0] * 100
    bf.quantize(model, "int8", example_inputs=(x,), target="reference")
    assert torch.equal(model(x), expected) and torch.equal(model.w, w)
    assert torch.equal(through_a_file(model, Own(run), tmp_path)(x), expected)


def test_modules_that_read_different_slices_of_one_parameter(tmp_path: Path) -> None:
    def top(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w[:16])

    def bottom(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w[16:])

    def pair() -> nn.ModuleList:
        shared = nn.Parameter(torch.randn(32, 32))
        return nn.ModuleList([Own(top, shared), Own(bottom, shared), Own(bottom, shared)])

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = pair()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([part(x) for part in self.parts], -1)

    model, x = Both(), torch.randn(2, 32)
    w = rounded(model.parts[0].w)
    expected = F.linear(x, torch.cat([w, w[16:]]))
    bf.quantize(model, "int8", example_inputs=(x,), target="reference")
    torch.testing.assert_close(model(x), expected)
    codes = [part.folded_weights[0].parts[0] for part in model.parts]
    assert getattr(model.parts[1], codes[1]) is getattr(model.parts[2], codes[2])
    torch.testing.assert_close(through_a_file(model, Both(), tmp_path)(x), expected)


def test_a_parameter_and_its_transpose_in_one_module(tmp_path: Path) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(x, w), w.t())

    model, x = Own(run), torch.randn(2, 32)
    w = model.w.detach().clone()
    expected = F.linear(F.linear(x, rounded(w)), rounded(w.t()))
    bf.quantize(model, "int8", example_inputs=(x,), target="reference")
    assert torch.equal(model(x), expected) and torch.equal(model.w, rounded(w))
    loaded = through_a_file(model, Own(run), tmp_path)
    assert torch.equal(loaded(x), expected) and torch.equal(loaded.w, rounded(w))


def test_a_forward_of_the_instance_or_of_a_subclass_is_what_is_folded() -> None:
    class Shifted(nn.Conv1d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight, bias) + 5

    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Conv1d(4, 4, 3), Shifted(4, 4, 3))
    model[1].forward = lambda x: F.linear(x, model[1].weight) * 3
    x = torch.randn(2, 4, 32)
    one, two = (rounded(module.weight) for module in model[:2])
    narrow = bf.format("int8[narrow]").fake_quantize(model[2].weight.detach().flatten(1))
    three = narrow.view_as(model[2].weight)
    y = F.linear(F.linear(x, one, model[0].bias), two) * 3
    expected = model[3](F.conv1d(y, three, model[2].bias))
    bf.quantize(model, "int8_conv", example_inputs=(x,), target="reference")
    # A convolution of its own is traced alone, and then even the least size that it asks for is a condition.
    assert [miss.module_path for miss in bf.report(model).misses] == ["3"]
    assert model[1].folded_weights and "forward" not in vars(model[1])
    torch.testing.assert_close(model(x), expected)


def test_a_folded_layer_takes_keywords() -> None:
    model, x = nn.ModuleDict({"fc": nn.Linear(32, 8), "embed": nn.Embedding(9, 32)}), torch.randn(2, 32)
    bf.quantize(model, "int8_all", target="reference")
    assert torch.equal(model["fc"](input=x), model["fc"](x))
    assert torch.equal(model["embed"](input=torch.tensor([3])), model["embed"](torch.tensor([3])))
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        model["fc"](x=x)


class Repeated(nn.Module):
    """Blocks alike; `run` is what calls one of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(count)
        )

    def forward(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        for block in self.blocks:
            x = x + run(block, x)
        return x


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_alike_blocks_compile_once(target: str) -> None:
    from torch._dynamo.testing import CompileCounter

    model = Repeated(12).eval()
    bf.quantize(model, "int8", target=target)
    count, x = CompileCounter(), torch.randn(2, 32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda block, x: block(x), backend=count)
    with torch.no_grad():
        expected = model(x, lambda block, x: block(x))
        torch.testing.assert_close(model(x, compiled), expected)
    assert count.frame_count == 1
    # Another dtype is another body, again one for all.
    first = model.blocks[0][0].body
    model.blocks[1:].bfloat16()
    assert model.blocks[0][0].body is first and model.blocks[0](x).dtype == torch.float32
    assert len({block[0].body for block in model.blocks[1:]}) == 1
    assert model.blocks[1](x.bfloat16()).dtype == torch.bfloat16


def test_one_module_under_two_names(tmp_path: Path) -> None:
    def looped() -> nn.Sequential:
        layer = nn.Linear(32, 32)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model, x = looped(), torch.randn(2, 32)
    bf.quantize(model, "int8", target="reference")
    loaded = through_a_file(model, looped(), tmp_path)
    assert loaded[0] is loaded[2] and torch.equal(loaded(x), model(x))
    apart = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    assert torch.equal(through_a_file(model, apart, tmp_path)(x), model(x))
    apart = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    bf.save(bf.quantize(apart, "int8", target="reference"), tmp_path / "apart.safetensors")
    with pytest.raises(bf.BitfoldError, match="0 and 2 are one module here and two in"):
        bf.load(tmp_path / "apart.safetensors", into=looped())


def test_a_layer_that_calibration_does_not_reach_is_said_before_a_write() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Half()
    with pytest.raises(bf.BitfoldError, match=r"layer unused .* no calibration batch reaches it"):
        bf.quantize(model, "int8_static", calibration=[torch.randn(2, 32)], target="reference")
    assert type(model.used) is nn.Linear and list(dict(model.named_parameters())) == [
        *("used.weight", "used.bias", "unused.weight", "unused.bias")
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ranks", 7),
        ("dtype", "zz"),
        ("dtype", None),
        ("names", []),
        ("weights", [{"back": [[1]]}]),
        ("graph", "x"),
    ],
)
def test_a_damaged_header_leaves_the_skeleton_alone(key: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    bf.save(bf.quantize(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), "int8"), path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + size])
    inner = json.loads(outer["__metadata__"]["bitfold"])
    inner["modules"]["1"][key] = value
    outer["__metadata__"]["bitfold"] = json.dumps(inner)
    text = json.dumps(outer).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    skeleton = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    before = list(skeleton.parameters())
    with pytest.raises(bf.BitfoldError):
        bf.load(path, into=skeleton)
    assert all(a is b for a, b in zip(before, skeleton.parameters(), strict=True))


def test_folded_already() -> None:
    model = nn.Sequential(nn.Linear(128, 32), nn.Linear(32, 32))
    bf.quantize(model, "int8", target="reference")
    assert bf.quantize(model, "int8", target="reference") is model
    with pytest.raises(bf.BitfoldError, match=r"layer 0 is quantized already \(int8\) and the recipe wants"):
        bf.quantize(model, "int4", target="reference")
    with pytest.raises(bf.BitfoldError, match=r"layer 0 is quantized already \(int8\) and the recipe wants"):
        bf.quantize(model, "int8_dynamic", target="reference")


def test_a_rule_that_names_no_layer_is_reported() -> None:
    model = nn.ModuleDict({"down": nn.Linear(32, 32), "up": nn.Linear(32, 32)})
    recipe = bf.Recipe("mine", (Rule(weight="int8"), Rule("dwon", skip="by hand"), Rule("up", skip="too")))
    bf.quantize(model, recipe, target="reference")
    said = [str(miss) for miss in bf.report(model).misses if "no layer matches" in str(miss)]
    assert len(said) == 1 and "dwon" in said[0] and "'down'" in said[0]


def test_a_forward_that_reads_the_mode_stays_float_and_is_reported() -> None:
    class Dropping(Own):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(F.linear(x, self.w), 0.5, self.training)

    model = nn.Sequential(nn.Linear(32, 32), Dropping(F.linear))
    bf.quantize(model, "int8", example_inputs=(torch.randn(2, 32),), target="reference")
    assert type(model[1]) is Dropping and model[1].training
    assert "train() and another in eval()" in str(bf.report(model).misses[0])


def test_models_are_quantized_in_threads() -> None:
    def one(seed: int) -> bool:
        model, x = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)), Own(F.linear)), torch.randn(2, 32)
        bf.quantize(model, "int8", example_inputs=(x,), target="reference")
        return bool(model(x).isfinite().all()) and len(bf.report(model).layers) == 4

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(4)))


def test_parametrized_layers_stay_float_and_are_reported() -> None:
    from torch.nn.utils import parametrizations, parametrize

    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.triu() + weight.triu(1).mT

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(32, 2)), nn.Parameter(torch.randn(2, 32))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.a @ self.b

    def model() -> nn.Sequential:
        layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)), Own(F.linear), nn.Linear(32, 32))
        for layer in layers[:2]:
            parametrize.register_parametrization(layer, "weight", Symmetric())
        parametrize.register_parametrization(layers[1], "weight", Added())
        parametrizations.weight_norm(layers[2])
        parametrizations.orthogonal(layers[3])
        parametrize.register_parametrization(layers[4], "bias", nn.Identity())
        parametrize.register_parametrization(layers[5], "w", Symmetric())
        return layers

    x = torch.randn(2, 32)
    for example in (None, (x,)):
        mine = model()
        before = mine[:6](x)
        bf.quantize(mine, "int8", example_inputs=example, target="reference")
        report = bf.report(mine)
        assert [layer.path for layer in report.layers] == ["6"] and torch.equal(mine[:6](x), before)
        assert [miss.module_path for miss in report.misses] == [*"012345"]
        assert all("computed by a parametrization" in miss.reason for miss in report.misses)
        assert "its bias is computed" in report.misses[4].reason
