"""torchao's tensors read as they are, with torchao's own dequantization as the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf

pytest.importorskip("torchao")
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int4Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    PerTensor,
    quantize_,
)
from torchao.quantization.granularity import PerBlock
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

K, N = 128, 64


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(K, N), nn.LayerNorm(N), nn.Linear(N, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))  # type: ignore[no-any-return]


CONFIGS: dict[str, tuple[Any, str]] = {
    "int8": (Int8WeightOnlyConfig(), "int8"),
    "int8 tensor": (Int8WeightOnlyConfig(granularity=PerTensor()), "int8[tensor]"),
    "int8 dynamic": (Int8DynamicActivationInt8WeightConfig(), "int8"),
    "int4 group": (IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), "int4[g32,f32]"),
    "int3 row": (IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerAxis(0)), "int3"),
    "int4 asym": (
        IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC
        ),
        "int4[g32,f32,zero]",
    ),
    "int4 with int8": (
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
        "int4[g32,f32]",
    ),
    "fp8": (Float8WeightOnlyConfig(), "float8_e4m3fn"),
}


def quantized(config: Any) -> Model:
    model = Model().eval()
    quantize_(model, config)
    return model


def on_file(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_torchaos(name: str, tmp_path: Path) -> None:
    config, fmt = CONFIGS[name]
    theirs = quantized(config)
    ours = bf.load_checkpoint(on_file(theirs, tmp_path / "s.pt"), into=Model().eval(), target="reference")
    for layer in ("up", "down"):
        want = theirs.get_submodule(layer).weight.dequantize()
        assert torch.equal(ours.get_submodule(layer).weight.as_subclass(Tensor), want), layer
    assert {layer.format for layer in bf.report(ours).layers} == {fmt}
    x = torch.randn(7, K)
    # Activations: torchao clamps a scale at another smallest number and divides where bitfold multiplies by
    # the reciprocal; a code may differ by one in a few places of 128.
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.02)


def with_weights(make: Any) -> Model:
    model = Model().eval()
    for module in (model.up, model.down):
        module.weight = nn.Parameter(make(module.weight.detach()), requires_grad=False)
    return model


def block(shape: tuple[int, int]) -> Any:
    return lambda weight: Float8Tensor.from_hp(weight, granularity=PerBlock(list(shape)))


MADE: dict[str, tuple[Any, str]] = {
    "fp8 block": (block((32, 32)), "float8_e4m3fn[32x32,f32]"),
    "fp8 tensor": (lambda w: Float8Tensor.from_hp(w, granularity=PerTensor()), "float8_e4m3fn[tensor]"),
    "mxfp8": (lambda w: MXTensor.to_mx(w, torch.float8_e4m3fn), "mxfp8"),
    "mxfp4": (lambda w: MXTensor.to_mx(w, torch.float4_e2m1fn_x2), "mxfp4"),
    "mxfp8 swizzled": (lambda w: MXTensor.to_mx(w, torch.float8_e4m3fn, is_swizzled_scales=True), "mxfp8"),
    "nvfp4": (
        lambda w: NVFP4Tensor.to_nvfp4(w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().max())),
        "nvfp4",
    ),
    "nvfp4 one level": (NVFP4Tensor.to_nvfp4, "nvfp4[one_level]"),
}


@pytest.mark.parametrize("name", MADE)
def test_tensors_made_one_by_one(name: str, tmp_path: Path) -> None:
    make, fmt = MADE[name]
    theirs = with_weights(make)
    ours = bf.load_checkpoint(on_file(theirs, tmp_path / "s.pt"), into=Model().eval(), target="reference")
    for layer in ("up", "down"):
        want = theirs.get_submodule(layer).weight.dequantize()
        own = ours.get_submodule(layer).weight.as_subclass(Tensor)
        # NVFP4: torchao multiplies the two scales first, bitfold too; the product is rounded once in both.
        assert torch.equal(own, want), layer
    assert {str(bf.format(layer.format)) for layer in bf.report(ours).layers} == {str(bf.format(fmt))}


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_tensors(symmetric: bool, tmp_path: Path) -> None:
    """Made by hand: what makes them needs a GPU. value = code * scale + zero, the even code low."""
    values = {}

    def make(weight: Tensor) -> Any:
        rows, k = weight.shape
        codes = torch.randint(-8, 8, (rows, k), dtype=torch.int8)
        scale = torch.rand(k // 32, rows).bfloat16()
        zero = torch.zeros_like(scale) if symmetric else torch.randn(k // 32, rows).bfloat16()
        packed = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
        spread = [part.T.float().repeat_interleave(32, 1) for part in (scale, zero)]
        values[rows] = codes.float() * spread[0] + spread[1]
        return Int4Tensor(packed, scale, zero, [1, 32], weight.shape)

    theirs = with_weights(make)
    ours = bf.load_checkpoint(on_file(theirs, tmp_path / "s.pt"), into=Model().eval(), target="reference")
    assert torch.equal(ours.up.weight.as_subclass(Tensor), values[N])
    assert torch.equal(ours.down.weight.as_subclass(Tensor), values[K])


def test_dynamic_fp8_activations_are_read(tmp_path: Path) -> None:
    theirs = with_weights(lambda w: Float8Tensor.from_hp(w, act_quant_kwargs=QuantizeTensorToFloat8Kwargs()))
    path = on_file(theirs, tmp_path / "s.pt")
    ours = bf.load_checkpoint(path, into=Model().eval(), target="reference")
    same = bf.quantize(Model().eval(), "fp8_dynamic", target="reference")
    assert "float8_e4m3fn" in str(ours.up.canonical.graph)
    targets = [[node.get("target") for node in m.up.canonical.graph["nodes"]] for m in (ours, same)]
    assert targets[0] == targets[1]
    alone = bf.load_checkpoint(path, into=Model().eval(), activations=False, target="reference")
    assert "bitfold.quantize.default" not in str(alone.up.canonical.graph)


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float",
        quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()),
        dtype=torch.float32,
    )
    theirs.save_pretrained(tmp_path / "ao")
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(config).eval()
    ours = bf.load_checkpoint(tmp_path / "ao", into=skeleton, target="reference")
    proj = "model.layers.0.self_attn.q_proj"
    want = theirs.get_submodule(proj).weight.dequantize()
    assert torch.equal(ours.get_submodule(proj).weight.as_subclass(Tensor), want)
    tokens = torch.arange(9)[None]
    # The same weights; torchao scales the sums, bitfold the weights: 64 roundings of 2**-24 of a product.
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "float.pt")
    with pytest.raises(bf.BitfoldError, match="no quantized tensor"):
        bf.load_checkpoint(tmp_path / "float.pt", into=Model())
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(bf.BitfoldError, match="no state dict that"):
        bf.load_checkpoint(tmp_path / "module.pt", into=Model())
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(bf.BitfoldError, match="holds a list"):
        bf.load_checkpoint(tmp_path / "list.pt", into=Model())
