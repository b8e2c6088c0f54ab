"""A model of transformers quantized by `from_pretrained`, saved, loaded again, and asked to generate."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold as bf

pytest.importorskip("transformers")
import transformers

from bitfold import BitfoldConfig
from bitfold.lowering import Folded

TOKENS = torch.arange(1, 9)[None]


def float_folder(path: Path, **more: Any) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **{"tie_word_embeddings": False} | more,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(path: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)


def folded(model: Any) -> dict[str, str]:
    return {
        path: module.folded_weights[0].canonical
        for path, module in model.named_modules()
        if isinstance(module, Folded)
    }


@pytest.mark.parametrize("recipe", ["int4[g64]", "int8_dynamic", "mxfp4"])
def test_there_and_back(recipe: str, tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    given = BitfoldConfig(recipe)
    model = load(source, quantization_config=given, dtype=torch.float32)
    same = bf.quantize(load(source, dtype=torch.float32), recipe)
    assert torch.equal(model(TOKENS).logits, same(TOKENS).logits)
    assert len(folded(model)) == 14
    model.save_pretrained(tmp_path / "small")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again, info = load(tmp_path / "small", dtype=torch.float32, output_loading_info=True)
    assert {key: set(info[key]) for key in ("missing_keys", "unexpected_keys")} == {
        "missing_keys": set(), "unexpected_keys": set()
    }  # fmt: skip
    assert folded(again) == folded(model)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(TOKENS, **kwargs), model.generate(TOKENS, **kwargs))
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "bitfold", "recipe": given.recipe}


def test_tied_embeddings_head_and_several_files(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float", tie_word_embeddings=True)
    model = load(source, quantization_config=BitfoldConfig("int8_all"))
    model.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    again = load(tmp_path / "small")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert again.lm_head.codes is again.model.embed_tokens.codes
    again.save_pretrained(tmp_path / "again")
    third = load(tmp_path / "again")
    assert torch.equal(third(TOKENS).logits, model(TOKENS).logits)


def test_another_dtype_while_loading(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    model = load(source, quantization_config=BitfoldConfig("int4[g32]"))
    model.save_pretrained(tmp_path / "small")
    half = load(tmp_path / "small", dtype=torch.bfloat16)
    assert half(TOKENS).logits.dtype is torch.bfloat16
    assert half.model.layers[0].mlp.up_proj.scales.dtype is model.model.layers[0].mlp.up_proj.scales.dtype
    # 2**-8 a rounding; a dozen of them follow each other in two layers.
    torch.testing.assert_close(half(TOKENS).logits.float(), model(TOKENS).logits, rtol=0.1, atol=0.05)


def test_a_model_that_was_quantized_by_hand_is_attached(tmp_path: Path) -> None:
    model = load(float_folder(tmp_path / "float"))
    with pytest.raises(bf.BitfoldError, match="nothing in this LlamaForCausalLM"):
        BitfoldConfig("int4[g32]").attach(model)
    bf.quantize(model, "int4[g32]")
    BitfoldConfig("int4[g32]").attach(model)
    model.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    # One file of it is a file of bf.save too.
    skeleton = transformers.LlamaForCausalLM(model.config)
    loaded = bf.load(tmp_path / "small" / "model.safetensors", into=skeleton.eval())
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_mistakes_are_said(tmp_path: Path) -> None:
    with pytest.raises(bf.BitfoldError, match="int44"):
        BitfoldConfig("int44")
    with pytest.raises(bf.BitfoldError, match="not bits"):
        BitfoldConfig("int4", bits=4)
    source = float_folder(tmp_path / "float")
    with pytest.raises(bf.BitfoldError, match="calibrated range"):
        load(source, quantization_config=BitfoldConfig("int8_static"))
    with pytest.raises(bf.BitfoldError, match="on one device"):
        load(
            source, quantization_config=BitfoldConfig("int8"), device_map={"model": "cpu", "lm_head": "disk"}
        )
    model = load(source, quantization_config=BitfoldConfig("int8"))
    model.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(bf.BitfoldError, match="not saved by bitfold"):
        load(tmp_path / "small")


def test_a_target_of_its_own(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    model = load(source, quantization_config=BitfoldConfig("int8", target="reference"))
    same = bf.quantize(load(source), "int8", target="reference")
    assert torch.equal(model(TOKENS).logits, same(TOKENS).logits)
