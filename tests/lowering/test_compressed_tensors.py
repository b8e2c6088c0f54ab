"""compressed-tensors checkpoints both ways, with the library itself as the oracle: codes, scales and values.

A checkpoint is made by the library's own compressors from weights and scales given here, read by bitfold,
compared with what the library decompresses, and written again: the same bytes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.checkpoints.schemes import activation_format, weight_format
from bitfold.passes.recipes import Recipe
from bitfold.passes.rules import Rule

pytest.importorskip("compressed_tensors", reason="the oracle: pip install compressed-tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

INT4 = {"num_bits": 4, "type": "int"}
INT8 = {"num_bits": 8, "type": "int"}
FP8 = {"num_bits": 8, "type": "float"}
DYNAMIC = {"strategy": "token", "symmetric": True, "dynamic": True}
MICRO = {"strategy": "group", "group_size": 32, "symmetric": True, "scale_dtype": "torch.uint8"}
NVFP4 = {
    "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
    "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip

SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int4 group": ("pack-quantized", INT4 | {"strategy": "group", "group_size": 32, "symmetric": True}, None),
    "int4 group asym": (
        "pack-quantized",
        INT4 | {"strategy": "group", "group_size": 32, "symmetric": False},
        None,
    ),
    "int4 channel": ("pack-quantized", INT4 | {"strategy": "channel", "symmetric": True}, None),
    "int4 channel asym": ("pack-quantized", INT4 | {"strategy": "channel", "symmetric": False}, None),
    "int3 group asym": (
        "pack-quantized",
        {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
        None,
    ),
    "int8 group": ("pack-quantized", INT8 | {"strategy": "group", "group_size": 32, "symmetric": True}, None),
    "int8 channel": ("pack-quantized", INT8 | {"strategy": "channel", "symmetric": True}, None),
    "int8 channel asym": ("pack-quantized", INT8 | {"strategy": "channel", "symmetric": False}, None),
    "w8a8": ("int-quantized", INT8 | {"strategy": "channel", "symmetric": True}, INT8 | DYNAMIC),
    "w8a8 asym": ("int-quantized", INT8 | {"strategy": "channel", "symmetric": False}, INT8 | DYNAMIC),
    "w8a8 tensor": ("int-quantized", INT8 | {"strategy": "tensor", "symmetric": True}, INT8 | DYNAMIC),
    "w4a8": (
        "int-quantized",
        INT4 | {"strategy": "group", "group_size": 32, "symmetric": True},
        INT8 | DYNAMIC,
    ),
    "fp8 tensor": ("float-quantized", FP8 | {"strategy": "tensor", "symmetric": True}, FP8 | DYNAMIC),
    "fp8 channel": ("float-quantized", FP8 | {"strategy": "channel", "symmetric": True}, FP8 | DYNAMIC),
    "fp8 block": (
        "float-quantized",
        FP8 | {"strategy": "block", "block_structure": [32, 32], "symmetric": True},
        FP8 | {"strategy": "group", "group_size": 32, "symmetric": True, "dynamic": True},
    ),
    "fp8 weights only": ("naive-quantized", FP8 | {"strategy": "channel", "symmetric": True}, None),
    "nvfp4": ("nvfp4-pack-quantized", NVFP4, None),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float"} | MICRO, None),
    "mxfp6": ("mxfp6-pack-quantized", {"num_bits": 6, "type": "float"} | MICRO, None),
    "mxfp8": ("mxfp8-quantized", FP8 | MICRO, None),
}
N, K = 66, 96  # neither fills whole words when packed along the rows, nor a whole number of 128


def shape_of(name: str) -> tuple[int, int]:
    return (64, K) if "block" in name else (N, K)


def test_the_oracle_would_store_it_so() -> None:
    from compressed_tensors.compressors.format import infer_module_format

    for name, (way, weights, inputs) in SCHEMES.items():
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
        assert infer_module_format(nn.Linear, scheme).value == way, name


class Model(nn.Module):
    """Two quantized layers, one with a bias, a norm, and a head that is left alone."""

    def __init__(self, n: int = N, k: int = K) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(k, n), nn.LayerNorm(n), nn.Linear(k, n, bias=False)
        self.head = nn.Linear(n, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(x)) + self.down(x))  # type: ignore[no-any-return]


def oracle(way: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> tuple[Any, Any]:
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    return BaseCompressor.get_value_from_registry(way), scheme


def given_scales(weight: Tensor, args: dict[str, Any]) -> dict[str, Tensor]:
    """Scales and zero points for the oracle, from the extremes of each block."""
    two_level = args["strategy"] == "tensor_group"
    fmt = weight_format(args, torch.float8_e4m3fn if two_level else torch.float32)
    assert fmt.scale is not None
    low, high = fmt.scale.granularity.extremes(weight.float())
    top = torch.maximum(-low, high)
    if args.get("scale_dtype") == "torch.uint8":
        return {"weight_scale": torch.exp2(torch.floor(torch.log2(top / fmt.element.reach)) + 1).bfloat16()}
    if two_level:
        divisor = 448 * 6 / top.max().reshape(1)
        return {
            "weight_scale": (top / 6 * divisor).to(torch.float8_e4m3fn).float(),
            "weight_global_scale": divisor,
        }
    if args["symmetric"]:
        scale = (top / fmt.element.reach).bfloat16()
        return {"weight_scale": scale.reshape(1) if args["strategy"] == "tensor" else scale}
    steps = 2 ** args["num_bits"] - 1
    scale = ((high.clamp(min=0) - low.clamp(max=0)) / steps).bfloat16()
    first = -(2 ** (args["num_bits"] - 1))
    zero = (first - torch.round(low.clamp(max=0) / scale)).clamp(first, first + steps)
    return {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}


def compressed(name: str, model: Model, path: Path) -> dict[str, Tensor]:
    """The checkpoint as the oracle writes it, in `path`; and its decompressed weights by path."""
    way, weights, inputs = SCHEMES[name]
    compressor, scheme = oracle(way, weights, inputs)
    tensors = {n: p.detach().bfloat16() for n, p in model.named_parameters()}
    values = {}
    for layer in ("up", "down"):
        weight = tensors.pop(f"{layer}.weight")
        own = compressor.compress({"weight": weight, **given_scales(weight, weights)}, scheme)
        tensors |= {f"{layer}.{key}": tensor for key, tensor in own.items()}
        values[layer] = compressor.decompress(own, scheme)["weight"]
    group = json.loads(scheme.model_dump_json())
    config = {
        "quant_method": "compressed-tensors", "format": way, "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": way}}, "ignore": ["head"], "kv_cache_scheme": None,
    }  # fmt: skip
    path.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    return values


def same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("name", SCHEMES)
def test_read_and_written_again(name: str, target: str, tmp_path: Path) -> None:
    n, k = shape_of(name)
    values = compressed(name, Model(n, k), tmp_path / "theirs")
    with torch.device("meta"):
        model = Model(n, k)
    bf.load_checkpoint(tmp_path / "theirs", into=model, target=target)
    for layer, value in values.items():
        own = model.get_submodule(layer).weight.as_subclass(Tensor)
        if name == "nvfp4":
            # One reciprocal instead of a division: two units in the last place of float32, which may turn a
            # rounding to bfloat16 (2**-8) the other way.
            torch.testing.assert_close(own, value.to(own.dtype), rtol=2**-8, atol=0)
        else:
            assert torch.equal(own, value.to(own.dtype)), layer
    assert type(model.head) is nn.Linear
    bf.save_checkpoint(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / which / "model.safetensors") for which in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert same_bits(tensor, ours[key]), key
    read = (
        json.loads((tmp_path / w / "config.json").read_text())["quantization_config"]
        for w in ("theirs", "ours")
    )
    for before, after in zip(*(_said(config) for config in read), strict=True):
        assert before == after


def _said(config: dict[str, Any]) -> list[Any]:
    """What both configurations must agree on, defaults filled in by the oracle."""
    from compressed_tensors.quantization import QuantizationConfig

    parsed = QuantizationConfig.model_validate(config)
    (scheme,) = parsed.config_groups.values()
    return [
        parsed.format, parsed.ignore, scheme.format, scheme.targets,
        *(
            args and (args.num_bits, args.type, args.symmetric, args.strategy, args.group_size,
                      args.block_structure, args.dynamic)
            for args in (scheme.weights, scheme.input_activations)
        ),
    ]  # fmt: skip


OURS = {
    "int4[g32]": None,
    "int4[g32,zero]": None,
    "uint4[g32,zero]": None,
    "int5[row,zero]": None,
    "int8": None,
    "int8[tensor]": "int8",
    "int4[g32,f32]": "int8",
    "q4_0": None,
    "float8_e4m3fn[tensor]": "float8_e4m3fn[tensor]",
    "float8_e4m3fn": "float8_e4m3fn",
    "nvfp4": None,
    "mxfp4": "mxfp4",
    "mxfp6_e2m3": None,
    "mxfp8": "mxfp8",
}


@pytest.mark.parametrize("weight", OURS)
def test_written_and_decompressed_by_the_oracle(weight: str, tmp_path: Path) -> None:
    """What bitfold quantized, as the oracle decompresses it: the same float32 values."""
    rule = Rule("re:up|down", weight=weight, input=OURS[weight] or "")
    model = bf.quantize(Model(), Recipe("some", (rule,)), target="reference")
    bf.save_checkpoint(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    compressor, scheme = oracle(group["format"], group["weights"], group["input_activations"])
    assert config["ignore"] == ["head"]
    for layer in ("up", "down"):
        own = {key.removeprefix(f"{layer}."): t for key, t in tensors.items() if key.startswith(f"{layer}.")}
        own.pop("bias", None)
        value = compressor.decompress(own, scheme)["weight"]
        held = model.get_submodule(layer).quantized(model.get_submodule(layer).folded_weights[0])
        expected = held.dequantize()
        if weight == "nvfp4":
            # Two reciprocals and a division instead of a product: three roundings of 2**-24 each, and the
            # oracle's values are in bfloat16 (2**-8).
            torch.testing.assert_close(value.float(), expected, rtol=2**-8, atol=0)
        elif value.dtype is torch.float32:
            assert torch.equal(value, expected)
        else:
            assert torch.equal(value, expected.to(value.dtype))
    again = bf.load_checkpoint(tmp_path / "out", into=Model(), target="reference")
    x = torch.randn(3, K)
    if weight not in ("uint4[g32,zero]", "q4_0"):  # q4_0 is int4[g32,f16] and how its scales are chosen
        assert bf.report(again).layers == bf.report(model).layers
    if weight != "nvfp4":
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("given", ["int8[tensor]", "int8[tensor,zero]", "float8_e4m3fn[tensor]"])
def test_static_activations_keep_their_scale(given: str, tmp_path: Path) -> None:
    weight = "int8" if given.startswith("int8") else "float8_e4m3fn"
    rule = Rule("re:up|down", weight=weight, input=given, observer="minmax")
    data = [torch.randn(4, K) for _ in range(3)]
    model = bf.quantize(Model(), Recipe("static", (rule,)), calibration=data, target="reference")
    bf.save_checkpoint(model, tmp_path / "out")
    again = bf.load_checkpoint(tmp_path / "out", into=Model(), target="reference")
    assert torch.equal(again(data[0]), model(data[0]))
    bf.save_checkpoint(again, tmp_path / "again")
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert same_bits(tensor, load_file(tmp_path / "again" / "model.safetensors")[key])
    without = bf.load_checkpoint(tmp_path / "out", into=Model(), activations=False, target="reference")
    assert not torch.equal(without(data[0]), model(data[0]))


def test_groups_of_several_formats_and_tied_weights(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Embedding(40, 32), nn.Linear(32, 32)
            self.lm_head = nn.Linear(32, 40, bias=False)
            self.lm_head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lm_head(self.up(self.embed(tokens)))  # type: ignore[no-any-return]

    model = bf.quantize(Tied(), "int4[g32]", target="reference")
    both = bf.quantize(
        Tied(), Recipe.parse("int4_all").but(Rule("up", weight="int4[g32]")), target="reference"
    )
    for one, name in ((model, "one"), (both, "both")):
        bf.save_checkpoint(one, tmp_path / name)
        again = bf.load_checkpoint(tmp_path / name, into=Tied(), target="reference")
        assert torch.equal(again(torch.arange(9)), one(torch.arange(9)))
        assert bf.report(again).layers == bf.report(one).layers
    assert again.lm_head.codes is again.embed.codes


BAD: dict[str, tuple[Any, str]] = {
    "no scale": (lambda t, c: t.pop("up.weight_scale"), "there are no codes for it|up.weight_packed"),
    "cut": (lambda t, c: t.update({"up.weight_packed": t["up.weight_packed"][:, :-1]}), "take .* words"),
    "sparse": (lambda t, c: c.update(format="sparse-24-bitmask"), "a sparse layout"),
    "preset": (lambda t, c: c.update(config_groups={"W4A16": ["Linear"]}), "names a preset"),
    "other bits": (lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=9), "of 9 bits"),
    "outputs": (
        lambda t, c: c["config_groups"]["group_0"].update(output_activations=INT8 | DYNAMIC),
        "outputs are quantized",
    ),
    "extra": (lambda t, c: t.update({"side.weight": torch.zeros(2)}), "'side.weight'"),
    "missing": (lambda t, c: t.pop("norm.weight"), "'norm.weight'"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_said_and_changes_nothing(what: str, tmp_path: Path) -> None:
    compressed("int4 group", Model(), tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    damage, message = BAD[what]
    damage(tensors, config["quantization_config"])
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "c" / "model.safetensors")
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    model = Model()
    before = dict(model.named_parameters())
    with pytest.raises(bf.BitfoldError, match=message):
        bf.load_checkpoint(tmp_path / "c", into=model)
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert type(model.up) is nn.Linear


@pytest.mark.parametrize("fmt", ["nf4[g32]", "q4_1", "mxfp6_e3m2", "float8_e5m2", "uint4"])
def test_a_format_without_a_word_is_refused(fmt: str, tmp_path: Path) -> None:
    model = bf.quantize(Model(), Recipe("some", (Rule("up", weight=fmt),)))
    with pytest.raises(bf.BitfoldError, match="layer up: compressed-tensors cannot say"):
        bf.save_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activations_are_as_the_oracle_names_them() -> None:
    assert str(activation_format(INT8 | DYNAMIC, None)) == "int8"
    assert str(activation_format({"num_bits": 4, "type": "float"} | MICRO, None)) == "mxfp4"
    with pytest.raises(bf.BitfoldError, match="activations=False"):
        activation_format(NVFP4 | {"dynamic": "local"}, None)


def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    """A Llama through the library's own loader: the same logits as the model's decoded weights give."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = bf.quantize(LlamaForCausalLM(config).eval(), "int4[g32,f32]", target="reference")
    bf.save_checkpoint(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.arange(10)[None]
    # The same weights in the same order of sums; attention may go another way through the same sums.
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config).eval()
    ours = bf.load_checkpoint(tmp_path / "out", into=skeleton, target="reference")
    assert torch.equal(ours(tokens).logits, model(tokens).logits)
