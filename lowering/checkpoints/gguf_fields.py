"""What a configuration of transformers says in a GGUF file: fields, and factors of positions' frequencies.

In: a configuration, and the file whose metadata are taken over, if there is one. Out: fields and tensors; a
BitfoldError for what llama.cpp would compute otherwise without a word.

    LlamaConfig(head_dim=64, rope_parameters={"rope_type": "linear", "factor": 4.0, ..})
    ->  llama.attention.key_length = 64, .., llama.rope.scaling.type = linear, llama.rope.scaling.factor = 4.0

llama.cpp knows Llama 3's positions by a tensor, `rope_freqs.weight`: what each frequency is divided by.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...formats import BitfoldError
from .gguf_read import GGUF

_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}

_BIASES = {
    "llama": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    "qwen2": ("attn_q", "attn_k", "attn_v"),
    "qwen3": (),
}
"""Layers of an architecture in which llama.cpp adds a bias, if the file has one."""


def check_tensors(names: Iterable[str], kind: str) -> None:
    """Raises BitfoldError for a bias that llama.cpp has no place for."""
    for name in names:
        layer, _, what = name.rpartition(".")
        if what == "bias" and layer.rpartition(".")[2] not in _BIASES[kind]:
            raise BitfoldError(
                f"llama.cpp's {kind} has no bias at {layer}; leave add=true out of correct_bias, or keep the "
                "model with bf.save"
            )


def check_config(config: Any, kind: str, source: GGUF | None) -> None:
    """Raises BitfoldError for a model that no field says."""
    act = str(getattr(config, "hidden_act", "silu"))
    if act not in ("silu", "swish"):
        raise BitfoldError(f"llama.cpp's {kind} computes silu in its MLPs, and this model {act}")
    if getattr(config, "use_sliding_window", False):
        raise BitfoldError(f"llama.cpp's {kind} attends to all tokens, and this model to a sliding window")
    rope = _rope_type(config)
    told = source is not None and source.reader.get_field(f"{kind}.rope.scaling.type") is not None
    if not (rope in ("default", "linear") or (rope == "llama3" and kind == "llama") or told):
        raise BitfoldError(
            f"how a GGUF file says positions of rope_type {rope!r} for {kind} is not known here; give like=, "
            "a GGUF file of the same model that says them"
        )


def write_fields(writer: Any, config: Any, kind: str) -> None:
    """All that llama.cpp wants to know. It loads no file that says nothing of a tokenizer, and by the word
    "none" one that runs on token numbers."""
    writer.add_string("tokenizer.ggml.model", "none")
    for name, attribute in _FIELDS.items():
        writer.add_uint32(f"{kind}.{name}", int(getattr(config, attribute)))
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        writer.add_uint32(f"{kind}.{name}", _head_dim(config))
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", float(config.rms_norm_eps))
    writer.add_float32(f"{kind}.rope.freq_base", float(config.rope_parameters["rope_theta"]))
    if _rope_type(config) == "linear":
        writer.add_string(f"{kind}.rope.scaling.type", "linear")
        writer.add_float32(f"{kind}.rope.scaling.factor", float(config.rope_parameters["factor"]))


def computed_tensors(config: Any) -> dict[str, Tensor]:
    """Tensors that are in the file and not among the model's parameters."""
    if _rope_type(config) != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = _head_dim(config)
    plain = float(config.rope_parameters["rope_theta"]) ** -(torch.arange(0, size, 2).float() / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return {"rope_freqs.weight": plain / scaled}


def _rope_type(config: Any) -> str:
    return str(config.rope_parameters.get("rope_type", "default"))


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
