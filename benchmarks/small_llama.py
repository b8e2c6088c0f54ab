"""A small decoder of Llama's kind, in plain torch: what train_lm.py trains and ptq.py quantizes.

In: token ids, int64 [batch, length]. Out: logits [batch, length, vocabulary].

    model = load(); model(ids)        7.3 M parameters: 8 layers of 256, MLP of 768, 4 heads over 2 of keys

Parameters are named as transformers names Llama's, and `config()` is what its LlamaConfig takes, so that the
committed file opens there too. Embedding and head are one tensor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FOLDER = Path(__file__).parent / "lm"


@dataclass(frozen=True)
class Size:
    """The numbers of a decoder, by the names that LlamaConfig has for them."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def config(self) -> dict[str, object]:
        """config.json, as transformers reads it."""
        fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
        return {**fixed, **asdict(self), "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0}


class Attention(nn.Module):
    """Causal attention over rotated queries and keys; fewer heads of keys than of queries."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.width = size.head_dim
        inner = size.num_key_value_heads * size.head_dim
        self.q_proj = nn.Linear(size.hidden_size, size.hidden_size, bias=False)
        self.k_proj = nn.Linear(size.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(size.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(size.hidden_size, size.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (_heads(p(x), self.width) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden_size, size.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size.hidden_size, size.intermediate_size, bias=False)
        self.down_proj = nn.Linear(size.intermediate_size, size.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(size), MLP(size)
        self.input_layernorm = nn.RMSNorm(size.hidden_size, size.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden_size, size.rms_norm_eps)
        self.dropout = dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocab_size, size.hidden_size)
        self.layers = nn.ModuleList(Layer(size, dropout) for _ in range(size.num_hidden_layers))
        self.norm = nn.RMSNorm(size.hidden_size, size.rms_norm_eps)
        angles = size.rope_theta ** (-torch.arange(0, size.head_dim, 2) / size.head_dim)
        turns = torch.outer(torch.arange(size.max_position_embeddings).float(), angles.float())
        self.register_buffer("cos", turns.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", turns.sin().repeat(1, 2), persistent=False)
        self.dropout = dropout

    def forward(self, ids: Tensor) -> Tensor:
        x = F.dropout(self.embed_tokens(ids), self.dropout, self.training)
        cos, sin = self.cos[: ids.shape[1]].to(x.dtype), self.sin[: ids.shape[1]].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class SmallLlama(nn.Module):
    """Token ids to logits."""

    def __init__(self, size: Size | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.size = size or Size()
        self.model = Decoder(self.size, dropout)
        self.lm_head = nn.Linear(self.size.hidden_size, self.size.vocab_size, bias=False)
        self.apply(_start)
        for layer in self.model.layers:  # branches that add to the residual stream begin smaller (GPT-2)
            for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                branch.weight.data /= (2 * self.size.num_hidden_layers) ** 0.5
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model(ids))
        return logits


def load(folder: str | Path = FOLDER, dtype: torch.dtype = torch.float32) -> SmallLlama:
    """The trained model in eval mode."""
    import json

    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    model = SmallLlama(Size(**{name: config[name] for name in Size.__dataclass_fields__}))
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(dtype).eval()


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def _heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
