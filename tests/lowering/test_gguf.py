"""GGUF both ways, with the gguf package as the oracle: values of every type, names, order of rows, bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bitfold as bf
from bitfold.lowering.checkpoints.gguf_blocks import _BLOCKS, read_blocks, write_blocks
from bitfold.lowering.checkpoints.gguf_read import open_gguf, permute_rows, unpermute_rows

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "MXFP4": [], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
"""Where the float16 numbers of a block begin."""


def any_blocks(kind: str, rows: int, count: int) -> np.ndarray:
    """Blocks of random bits: every code, every scale, but no infinity and no NaN."""
    block = _BLOCKS[kind]
    raw = np.random.default_rng(len(kind) + rows).integers(0, 256, (rows, count, block.size), dtype=np.uint8)
    for at in HALVES[kind]:
        raw[..., at + 1] &= 0xBF
    if kind == "MXFP4":
        raw[..., 0] %= 255
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", HALVES)
def test_every_value_is_the_packages(kind: str) -> None:
    raw = any_blocks(kind, 40, 7)
    want = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(read_blocks(kind, torch.from_numpy(raw)).dequantize().numpy(), want)


@pytest.mark.parametrize("kind", [kind for kind, block in _BLOCKS.items() if block.join])
def test_blocks_are_written_as_they_were_read(kind: str) -> None:
    raw = torch.from_numpy(any_blocks(kind, 12, 5))
    assert write_blocks(read_blocks(kind, raw))[0] == kind
    assert torch.equal(write_blocks(read_blocks(kind, raw))[1], raw)


def test_types_that_are_not_kept_are_named() -> None:
    with pytest.raises(bf.BitfoldError, match="GGUF's type IQ2_XS is not read"):
        read_blocks("IQ2_XS", torch.zeros(1, 74, dtype=torch.uint8))
    with pytest.raises(bf.BitfoldError, match="no GGUF type that is written here says int8"):
        write_blocks(bf.format("int8").quantize(torch.randn(2, 32)))
    raw = torch.full((1, 17), 255, dtype=torch.uint8)
    with pytest.raises(bf.BitfoldError, match="scale byte 255"):
        read_blocks("MXFP4", raw)


def test_rows_there_and_back() -> None:
    x = torch.arange(48)[:, None]
    assert torch.equal(permute_rows(unpermute_rows(x, 4), 4), x)


def config(kind: str = "llama", **more: Any) -> Any:
    sizes = {
        "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "head_dim": 64,
    }  # fmt: skip
    return transformers.AutoConfig.for_model(kind, **(sizes | more))


def model(kind: str = "llama", **more: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config(kind, **more)).eval()


TOKENS = torch.arange(12)[None]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("fmt", ["q8_0", "q4_0", "q4_1"])
def test_a_model_there_and_back(kind: str, fmt: str, tmp_path: Path) -> None:
    ours = bf.quantize(model(kind), fmt, target="reference")
    bf.save_checkpoint(ours, tmp_path / "m.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name, path in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
        held = tensors[f"blk.1.{name}.weight"]
        assert held.tensor_type.name == fmt.upper()
        want = torch.from_numpy(gguf.dequantize(held.data, held.tensor_type).copy())
        moved = unpermute_rows(want, 4) if (kind, name) == ("llama", "attn_q") else want
        assert torch.equal(ours.get_submodule(f"model.layers.1.{path}").weight, moved)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config(kind)).eval()
    again = bf.load_checkpoint(tmp_path / "m.gguf", into=skeleton, target="reference")
    assert torch.equal(again(TOKENS).logits, ours(TOKENS).logits)
    bf.save_checkpoint(again, tmp_path / "again.gguf", like=tmp_path / "m.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "again.gguf").tensors:
        np.testing.assert_array_equal(tensor.data, tensors[tensor.name].data)
    fields = [gguf.GGUFReader(tmp_path / f).fields for f in ("m.gguf", "again.gguf")]
    assert {k: v.contents() for k, v in fields[0].items()} == {k: v.contents() for k, v in fields[1].items()}


def k_file(path: Path, kinds: dict[str, str]) -> dict[str, Tensor]:
    """A Llama whose linears hold random blocks of K types; their values by the package."""
    source = model()
    bf.save_checkpoint(bf.quantize(source, "q8_0", target="reference"), path.with_suffix(".8.gguf"))
    reader = gguf.GGUFReader(path.with_suffix(".8.gguf"))
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
    values = {}
    for tensor in reader.tensors:
        kind = next((k for part, k in kinds.items() if part in tensor.name), None)
        if kind is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        shape = [int(n) for n in reversed(tensor.shape)]
        data = any_blocks(kind, shape[0], shape[1] // 256)
        for at in HALVES[kind]:  # scales of a size that weights have
            data.reshape(shape[0], -1, _BLOCKS[kind].size)[..., at + 1] = 0x10
        code = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(tensor.name, data, raw_dtype=code)
        values[tensor.name] = torch.from_numpy(gguf.dequantize(data, code).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_mixed_k_file(target: str, tmp_path: Path) -> None:
    kinds = {"attn_q": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q5_K", "ffn_up": "Q3_K", "ffn_gate": "Q2_K"}
    values = k_file(tmp_path / "k.gguf", kinds)
    loaded = bf.load_checkpoint(tmp_path / "k.gguf", into=model(), target=target)
    names = open_gguf(tmp_path / "k.gguf").names
    for path, parameter in model().named_parameters():
        name = names.of_parameter(path)
        if name in values:
            want = values[name]
            want = unpermute_rows(want, 4) if "attn_q" in str(name) else want
            own = loaded.get_submodule(path.removesuffix(".weight")).weight.as_subclass(Tensor)
            assert own.shape == parameter.shape
            assert torch.equal(own, want), name
    with pytest.raises(bf.BitfoldError, match=r"layer model\.layers\.0\.\S+: no GGUF type"):
        bf.save_checkpoint(loaded, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_mistakes_are_said(tmp_path: Path) -> None:
    bf.save_checkpoint(bf.quantize(model(), "q8_0", target="reference"), tmp_path / "m.gguf")
    with pytest.raises(bf.BitfoldError, match=r"no parameter of this LlamaForCausalLM"):
        bf.load_checkpoint(tmp_path / "m.gguf", into=model(num_hidden_layers=1))
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:5000])
    with pytest.raises(bf.BitfoldError, match="truncated"):
        bf.load_checkpoint(tmp_path / "cut.gguf", into=model())
    with pytest.raises(bf.BitfoldError, match="there is no GGUF file"):
        bf.load_checkpoint(tmp_path / "none.gguf", into=model())
    dynamic = bf.quantize(model(), "int8_dynamic", target="reference")
    with pytest.raises(bf.BitfoldError, match="quantizes its input"):
        bf.save_checkpoint(dynamic, tmp_path / "out.gguf")


LLAMA3 = {"rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_a_head_of_another_size_and_scaled_positions_are_in_the_file(tmp_path: Path) -> None:
    """Without them llama.cpp expects other shapes, or turns by other angles."""
    wide = model(
        "qwen3", head_dim=128, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    )
    bf.save_checkpoint(bf.quantize(wide, "q8_0", target="reference"), tmp_path / "wide.gguf")
    fields = {k: v.contents() for k, v in gguf.GGUFReader(tmp_path / "wide.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "none"
    said = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.scaling.type")
    assert [fields[f"qwen3.{name}"] for name in said] == [128, 128, 128, "linear"]
    assert fields["qwen3.rope.scaling.factor"] == 4.0

    rope = LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 256}
    bent = bf.quantize(model(rope_parameters=rope), "q8_0", target="reference")
    bf.save_checkpoint(bent, tmp_path / "bent.gguf")
    bf.save_checkpoint(bent, tmp_path / "again.gguf", like=tmp_path / "bent.gguf")
    for name in ("bent", "again"):
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        factors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
        own = bent.model.rotary_emb.inv_freq
        plain = 1 / 5e5 ** (torch.arange(0, 64, 2) / 64)
        torch.testing.assert_close(plain / factors, own)
        assert float(factors[0]) == 1.0 and float(factors[-1]) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
        ("qwen2", {"rope_parameters": LLAMA3 | {"rope_type": "llama3"}}, "'llama3' for qwen2"),
        ("llama", {"hidden_act": "gelu"}, "computes silu"),
        ("qwen2", {"use_sliding_window": True}, "a sliding window"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    kind: str, more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    given = model(kind)
    for name, value in more.items():
        setattr(given.config, name, value)
    bf.quantize(given, "q8_0", target="reference")
    with pytest.raises(bf.BitfoldError, match=said):
        bf.save_checkpoint(given, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_real_file_into_a_skeleton_on_meta() -> None:
    from bitfold.tools.smollm2 import default_path, load_smollm2

    try:
        path = default_path()
    except bf.BitfoldError as error:
        pytest.skip(f"NO MODEL, the real one is not tested: {error}")
    known = load_smollm2(path)
    with torch.device("meta"):
        skeleton = type(known.model)(known.model.config).eval()
    loaded = bf.load_checkpoint(path, into=skeleton, target="reference")
    with torch.inference_mode():
        # The same codes; embedding and head decode a row at a time to the same float32.
        torch.testing.assert_close(loaded(TOKENS).logits, known.model(TOKENS).logits, rtol=1e-4, atol=1e-4)
