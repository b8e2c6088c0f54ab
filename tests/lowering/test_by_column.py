"""AutoAWQ and GPTQ checkpoints: packed here from codes, read by bitfold, every value the one that was packed.

AutoAWQ's packing is also read by compressed-tensors' converter, an independent one. GPTQ's is packed by a
loop over bits.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bitfold as bf

N, K, GROUP = 64, 96, 32


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(K, N), nn.LayerNorm(N), nn.Linear(N, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))  # type: ignore[no-any-return]


def stream(codes: Tensor, bits: int) -> Tensor:
    """[R, C] -> int32 [R, C * bits / 32]: number i has bits i * bits and on, the low ones first."""
    ones = (codes.unsqueeze(-1).long() >> torch.arange(bits)) & 1
    words = ones.reshape(codes.shape[0], -1, 32) << torch.arange(32)
    return words.sum(-1).to(torch.uint32).view(torch.int32)


def numbers(bits: int, n: int, k: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], zero points [N, G], scales float16 [N, G]."""
    codes = torch.randint(0, 1 << bits, (n, k))
    zeros = torch.randint(1, 1 << bits, (n, k // group))
    zeros = torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    return codes, zeros, (torch.rand(n, k // group) / 50 + 0.001).half()


def value(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """(code - zero) * scale in float32."""
    size = codes.shape[1] // zeros.shape[1]
    zeros, scales = zeros.repeat_interleave(size, 1), scales.float().repeat_interleave(size, 1)
    return (codes - zeros).float() * scales


def write(path: Path, layers: dict[str, dict[str, Tensor]], config: dict[str, Any]) -> None:
    model = Model()
    tensors = {name: p.detach().clone() for name, p in model.named_parameters() if "weight" not in name}
    tensors["norm.weight"] = model.norm.weight.detach()
    for layer, parts in layers.items():
        tensors |= {f"{layer}.{name}": part.contiguous() for name, part in parts.items()}
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": config}))


def gptq(bits: int, *, symmetric: bool, v2: bool = False, group: int = GROUP) -> tuple[Any, Any]:
    layers, values = {}, {}
    for layer, (n, k) in (("up", (N, K)), ("down", (K, N))):
        size = k if group == -1 else group
        codes, zeros, scales = numbers(bits, n, k, size, symmetric)
        layers[layer] = {
            "qweight": stream(codes, bits).T,
            "qzeros": stream((zeros if v2 else zeros - 1).T, bits),
            "scales": scales.T,
            "g_idx": torch.arange(k, dtype=torch.int32) // size,
        }
        values[layer] = value(codes, zeros, scales)
    # A layer without a bias gets one of zeros from the packer.
    layers["down"]["bias"] = torch.zeros(K, dtype=torch.float16)
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": symmetric,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }  # fmt: skip
    return layers, (config, values)


def check(model: nn.Module, values: dict[str, Tensor]) -> None:
    for layer, want in values.items():
        assert torch.equal(model.get_submodule(layer).weight.as_subclass(Tensor), want), layer


@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, symmetric: bool, v2: bool, group: int, tmp_path: Path) -> None:
    layers, (config, values) = gptq(bits, symmetric=symmetric, v2=v2, group=group)
    write(tmp_path / "c", layers, config)
    model = bf.load_checkpoint(tmp_path / "c", into=Model(), target="reference")
    check(model, values)
    text = bf.report(model).layers[0].format
    assert (text.startswith("int"), "zero" in text) == (symmetric, not symmetric)


def test_gptq_runs_on_the_cpu_target_and_is_saved_as_compressed_tensors(tmp_path: Path) -> None:
    layers, (config, values) = gptq(4, symmetric=False)
    write(tmp_path / "c", layers, config)
    x = torch.randn(5, K)
    reference, fast = (
        bf.load_checkpoint(tmp_path / "c", into=Model().eval(), target=t) for t in ("reference", "cpu")
    )
    # Sums of 96 and 64 products in another order: 100 roundings of 2**-24 of numbers below 30.
    torch.testing.assert_close(torch.compile(fast)(x), reference(x), rtol=1e-4, atol=1e-4)
    bf.save_checkpoint(reference, tmp_path / "again")
    check(bf.load_checkpoint(tmp_path / "again", into=Model(), target="reference"), values)


def test_gptq_with_the_config_in_a_file_of_its_own(tmp_path: Path) -> None:
    layers, (config, values) = gptq(4, symmetric=True)
    write(tmp_path / "c", layers, config)
    (tmp_path / "c" / "config.json").unlink()
    del config["quant_method"]
    (tmp_path / "c" / "quantize_config.json").write_text(json.dumps(config))
    check(bf.load_checkpoint(tmp_path / "c", into=Model(), target="reference"), values)


def awq(*, symmetric: bool = False) -> tuple[Any, Any]:
    layers, values = {}, {}
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    for layer, (n, k) in (("up", (N, K)), ("down", (K, N))):
        codes, zeros, scales = numbers(4, n, k, GROUP, symmetric)

        def packed(by_input: Tensor) -> Tensor:
            woven = by_input.reshape(by_input.shape[0], -1, 8)[..., order].flatten(1)
            return stream(woven, 4)

        layers[layer] = {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T}
        values[layer] = value(codes, zeros, scales)
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return layers, (config, values)


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq(symmetric: bool, tmp_path: Path) -> None:
    layers, (config, values) = awq(symmetric=symmetric)
    write(tmp_path / "c", layers, config)
    model = bf.load_checkpoint(tmp_path / "c", into=Model(), target="reference")
    check(model, values)
    assert bf.report(model).layers[0].format == ("int4[g32,f16]" if symmetric else "uint4[g32,f16,zero]")


def test_awq_as_compressed_tensors_converts_it(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the oracle: pip install compressed-tensors")
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    from bitfold.lowering.checkpoints.compressed_write import write_compressed

    layers, (config, _) = awq()
    write(tmp_path / "c", layers, config)
    model = bf.load_checkpoint(tmp_path / "c", into=Model(), target="reference")
    theirs = AutoAWQConverter(group_size=GROUP).process(
        {f"{layer}.{name}": part for layer, parts in layers.items() for name, part in parts.items()}
    )
    ours = write_compressed(model).tensors
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_in_the_order_of_activations(symmetric: bool, target: str, tmp_path: Path) -> None:
    """A group's columns anywhere: the same weight, the same product, also after a file of our own."""
    layers, values = {}, {}
    for layer, (n, k) in (("up", (N, K)), ("down", (K, N))):
        codes, zeros, scales = numbers(4, n, k, GROUP, symmetric)
        groups = torch.arange(k) // GROUP
        groups = groups[torch.randperm(k)]
        layers[layer] = {
            "qweight": stream(codes, 4).T,
            "qzeros": stream((zeros - 1).T, 4),
            "scales": scales.T,
            "g_idx": groups.to(torch.int32),
        }
        values[layer] = (codes - zeros[:, groups]).float() * scales.float()[:, groups]
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}
    write(tmp_path / "c", layers, config)
    model = bf.load_checkpoint(tmp_path / "c", into=Model().eval(), target=target)
    check(model, values)
    x = torch.randn(3, K)
    with torch.no_grad():
        hidden = model.norm(torch.nn.functional.linear(x, values["up"], model.up.bias))
        want = torch.nn.functional.linear(hidden, values["down"])
        # Sums of 96 products in another order: 100 roundings of 2**-24 of numbers below 30.
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        bf.save(model, tmp_path / "m.safetensors")
        again = bf.load(tmp_path / "m.safetensors", into=Model().eval(), target=target)
        check(again, values)
        assert torch.equal(again(x), model(x))
    with pytest.raises(bf.BitfoldError, match="layer up: its forward is more than one linear"):
        bf.save_checkpoint(model, tmp_path / "out")


def damaged_order(parts: dict[str, Tensor]) -> None:
    parts["g_idx"][0] = 1


BAD: dict[str, Any] = {
    "order": (lambda parts, config: damaged_order(parts), "does not name each of 3 groups 32 times"),
    "zero of zero": (
        lambda parts, config: parts.update(qzeros=parts["qzeros"] | 15),
        "a zero point is stored",
    ),
    "marlin": (lambda parts, config: config.update(checkpoint_format="marlin"), "the layout 'marlin'"),
    "five bits": (lambda parts, config: config.update(bits=5), "of 5 bits"),
    "group": (lambda parts, config: config.update(group_size=16), "its scales are"),
    "no scales": (lambda parts, config: parts.pop("scales"), "float scales"),
    "dynamic": (lambda parts, config: config.update(dynamic={"-:.*": {}}), "different ways"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_kept_is_said(what: str, tmp_path: Path) -> None:
    layers, (config, _) = gptq(4, symmetric=False)
    damage, message = BAD[what]
    damage(layers["up"], config)
    write(tmp_path / "c", layers, config)
    model = Model()
    with pytest.raises(bf.BitfoldError, match=message):
        bf.load_checkpoint(tmp_path / "c", into=model)
    assert type(model.up) is nn.Linear


def test_another_awq_layout_is_refused(tmp_path: Path) -> None:
    layers, (config, _) = awq()
    write(tmp_path / "c", layers, config | {"version": "gemv"})
    with pytest.raises(bf.BitfoldError, match="'gemv'; read are 'gemm' of 4 bits"):
        bf.load_checkpoint(tmp_path / "c", into=Model())
