"""Biases that `correct_bias{add=true}` gives to a model of transformers are in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold as bf

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(10)[None]


def corrected(kind: str, recipe: str = "int8[g32]") -> Any:
    """A model of one layer, each of whose linears has a bias."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": False,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    data = [{"input_ids": TOKENS}]
    return bf.quantize(
        model, recipe, algorithm="correct_bias{add=true}", calibration=data, target="reference"
    )


def test_a_folder_says_biases_that_were_added(tmp_path: Path) -> None:
    ours = corrected("llama")
    bf.save_checkpoint(ours, tmp_path / "out")
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        skeleton = transformers.AutoModelForCausalLM.from_config(config).eval()
    again = bf.load_checkpoint(tmp_path / "out", into=skeleton, target="reference")
    assert torch.equal(again(TOKENS).logits, ours(TOKENS).logits)
    assert bool(again.model.layers[0].mlp.down_proj.bias.any())
    assert not ours.config.mlp_bias  # the model's own configuration is as it was
    bf.save_checkpoint(again, tmp_path / "more")
    assert (tmp_path / "more/config.json").read_text() == (tmp_path / "out/config.json").read_text()


def test_biases_that_no_configuration_says_are_refused(tmp_path: Path) -> None:
    """Qwen2 has them at q, k and v alone."""
    with pytest.raises(bf.BitfoldError, match=r"down_proj has a bias, which no configuration of a Qwen2"):
        bf.save_checkpoint(corrected("qwen2"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_gguf_has_them_where_llama_cpp_adds_them(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    ours = corrected("llama", "q8_0")
    bf.save_checkpoint(ours, tmp_path / "m.gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {"blk.0.ffn_down.bias", "blk.0.attn_output.bias"} <= names
    for kind in ("qwen2", "qwen3"):
        with pytest.raises(bf.BitfoldError, match=rf"llama.cpp's {kind} has no bias at blk\.0\."):
            bf.save_checkpoint(corrected(kind, "q8_0"), tmp_path / "q.gguf")
    assert not (tmp_path / "q.gguf").exists()
