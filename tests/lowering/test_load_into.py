"""`bf.load` into skeletons of every kind: in another dtype, on meta, quantized already by another recipe."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import bitfold as bf
from bitfold.lowering import Target, register_target
from bitfold.lowering import target as targets
from bitfold.passes import Miss


class Model(nn.Module):
    """Two linears, a norm with buffers between them, and a head tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.up, self.norm, self.down = nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 32)
        self.lm_head = nn.Linear(32, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.down(self.norm(self.up(self.embed(tokens)))))  # type: ignore[no-any-return]


TOKENS = torch.arange(8)


def only(*paths: str) -> bf.Recipe:
    return bf.Recipe("only", tuple(bf.Rule(path, weight="int8") for path in paths))


def quantized(recipe: Any, target: str = "reference") -> Model:
    return bf.quantize(Model().eval(), recipe, target=target)  # type: ignore[no-any-return]


RECIPES: dict[str, Any] = {
    "up": only("up"),
    "down": only("down"),
    "linears": "int4[g32]",
    "everything": "int8_all",
}


OTHER_RECIPES = [(there, here, "reference") for there in RECIPES for here in RECIPES if here != there]


@pytest.mark.parametrize(("there", "here", "target"), [*OTHER_RECIPES, ("up", "everything", "cpu")])
def test_a_skeleton_quantized_by_another_recipe(there: str, here: str, target: str, tmp_path: Path) -> None:
    model = quantized(RECIPES[there], target)
    bf.save(model, tmp_path / "m.safetensors")
    loaded = bf.load(tmp_path / "m.safetensors", into=quantized(RECIPES[here], target), target=target)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert {n: (p.dtype, p.shape, p.requires_grad) for n, p in loaded.named_parameters()} == {
        n: (p.dtype, p.shape, p.requires_grad) for n, p in model.named_parameters()
    }
    assert bf.report(loaded).layers == bf.report(model).layers


def test_a_quantized_skeleton_of_other_sizes_or_names_is_left_alone(tmp_path: Path) -> None:
    bf.save(bf.quantize(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)), only("0")), tmp_path / "m")
    other = bf.quantize(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 9)), "int8")
    with pytest.raises(bf.BitfoldError, match=r"1\.bias has shape \[9\] here and \[8\]"):
        bf.load(tmp_path / "m", into=other)
    other = bf.quantize(nn.Sequential(nn.Linear(32, 32), nn.Linear(16, 8)), "int8")
    with pytest.raises(bf.BitfoldError, match=r"1\.weight has shape \[8, 16\] here and \[8, 32\]"):
        bf.load(tmp_path / "m", into=other)
    longer = bf.quantize(
        nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(8, 8, bias=False)), "int8"
    )
    with pytest.raises(bf.BitfoldError, match=r"no tensor for '2\.weight'"):
        bf.load(tmp_path / "m", into=longer)
    assert isinstance(longer[1], bf.lowering.Folded) and isinstance(other[1], bf.lowering.Folded)


def test_a_forward_that_quantizing_replaced_is_not_forgotten(tmp_path: Path) -> None:
    def pair() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        model[1].forward = lambda x: F.linear(x, model[1].weight) * 3
        return model

    x = torch.randn(2, 32)
    bf.save(bf.quantize(pair(), only("0")), tmp_path / "m")
    other = bf.quantize(pair(), "int8", example_inputs=(x,), target="reference")
    before = other(x)
    with pytest.raises(
        bf.BitfoldError, match="has replaced the forward that was set on it; make the skeleton"
    ):
        bf.load(tmp_path / "m", into=other)
    assert torch.equal(other(x), before)


@pytest.mark.parametrize("quantized_before", [False, True])
@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("there", "here"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_the_dtype_is_that_of_the_skeleton(
    there: torch.dtype, here: torch.dtype, target: str, quantized_before: bool, tmp_path: Path
) -> None:
    model = quantized("int4[g32]", target).to(there)
    bf.save(model, tmp_path / "m.safetensors")
    skeleton = Model().eval().to(here)
    if quantized_before:
        bf.quantize(skeleton, "int8", target=target)
    loaded = bf.load(tmp_path / "m.safetensors", into=skeleton, target=target)
    expected = model.to(here)
    assert loaded(TOKENS).dtype == here and torch.equal(loaded(TOKENS), expected(TOKENS))
    assert loaded.up.compute_dtype == loaded.up.weight.dtype == here
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {
        n: t.dtype for n, t in expected.state_dict().items()
    }
    assert loaded.up.scales.dtype == torch.bfloat16 and loaded.norm.num_batches_tracked.dtype == torch.int64
    bf.save(loaded, tmp_path / "again.safetensors")
    bf.save(expected, tmp_path / "expected.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


@pytest.mark.parametrize("quantized_before", [False, True])
def test_on_meta_the_dtype_is_that_of_the_file(quantized_before: bool, tmp_path: Path) -> None:
    model = quantized("int8").to(torch.bfloat16)
    bf.save(model, tmp_path / "m.safetensors")
    skeleton = quantized("int4[g32]").to("meta") if quantized_before else Model().eval().to("meta")
    loaded = bf.load(tmp_path / "m.safetensors", into=skeleton, target="reference")
    assert loaded(TOKENS).dtype == torch.bfloat16 and torch.equal(loaded(TOKENS), model(TOKENS))


def test_what_is_a_parameter_or_a_buffer_is_said_by_the_skeleton(tmp_path: Path) -> None:
    model = quantized("int8")
    model.register_buffer("gain", torch.arange(3.0))
    bf.save(model, tmp_path / "m.safetensors")
    skeleton = Model().eval()
    skeleton.gain = nn.Parameter(torch.zeros(3))
    loaded = bf.load(tmp_path / "m.safetensors", into=skeleton, target="reference")
    assert "gain" in dict(loaded.named_parameters()) and "gain" not in dict(loaded.named_buffers())
    assert torch.equal(loaded.gain, torch.arange(3.0))


def test_a_buffer_that_the_file_lacks(tmp_path: Path) -> None:
    bf.save(quantized("int8"), tmp_path / "m.safetensors")
    skeleton = Model().eval()
    skeleton.register_buffer("mask", torch.ones(3))
    assert torch.equal(bf.load(tmp_path / "m.safetensors", into=skeleton).mask, torch.ones(3))
    skeleton = Model().eval().to("meta")
    skeleton.register_buffer("mask", torch.ones(3, device="meta"))
    with pytest.raises(bf.BitfoldError, match="has no tensor for 'mask'"):
        bf.load(tmp_path / "m.safetensors", into=skeleton)


def test_numbers_of_another_kind_are_not_copied(tmp_path: Path) -> None:
    bf.save(quantized("int8"), tmp_path / "m.safetensors")
    skeleton = Model().eval()
    skeleton.norm.num_batches_tracked = torch.zeros(())
    with pytest.raises(
        bf.BitfoldError, match=r"num_batches_tracked is torch.float32 here and torch.int64 in"
    ):
        bf.load(tmp_path / "m.safetensors", into=skeleton)
    assert type(skeleton.up) is nn.Linear


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_a_target_lowers_for_the_dtype_of_the_skeleton(saved: torch.dtype, tmp_path: Path) -> None:
    """Kernels of a GPU take half precision, and a model is often saved as it was trained, in float32."""
    seen: list[torch.dtype] = []

    @register_target
    class Looks(Target):
        name = "looks"

        def supports(self, region: GraphModule) -> bool | Miss:
            return True

        def lower(self, region: GraphModule) -> GraphModule:
            values = [node.meta["val"] for node in region.graph.nodes if "val" in node.meta]
            seen.extend(value.dtype for value in values if value.is_floating_point())
            return region

    try:
        model = quantized("int8[bf16]").to(saved)
        bf.save(model, tmp_path / "m.safetensors")
        for dtype in (torch.float32, torch.bfloat16):
            seen.clear()
            loaded = bf.load(tmp_path / "m.safetensors", into=Model().eval().to(dtype), target="looks")
            other = {torch.float32, torch.bfloat16} - {dtype}
            # Scales are bfloat16 in both; no number of the layers is of the other dtype.
            assert dtype in seen and (dtype is torch.float32 or not other & set(seen))
            assert loaded(TOKENS).dtype == dtype and loaded.up.compute_dtype == dtype
    finally:
        del targets._registered["looks"]
