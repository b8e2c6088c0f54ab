"""A decoder in the shape of Llama-3-8B with random weights and a static cache, for one token at a time.

In: sizes, a batch, a device. Out: a module of (token [B, 1], position [1]) to logits [B, 1, vocabulary].

    model = build(LLAMA_8B, 1, "cuda");  model(token, position)   ->   logits [1, 1, 128256]

As in common code: queries, keys and values by one projection, gate and up by two, RMSNorm as torch has it,
the cache two buffers a layer that the forward writes to, the head apart from the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_BASE = 500000.0


@dataclass(frozen=True)
class Sizes:
    """tokens: that the cache holds; position: where the measured token stands."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    tokens: int
    position: int

    @property
    def dim(self) -> int:
        """Of a head."""
        return self.width // self.heads


LLAMA_8B = Sizes(32, 4096, 32, 8, 14336, 128256, 512, 200)
TINY = Sizes(32, 256, 4, 2, 512, 512, 64, 20)


class Attention(nn.Module):
    def __init__(self, s: Sizes, batch: int) -> None:
        super().__init__()
        self.s = s
        self.qkv = nn.Linear(s.width, (s.heads + 2 * s.kv_heads) * s.dim, bias=False)
        self.out = nn.Linear(s.width, s.width, bias=False)
        for name in ("keys", "values"):
            held = torch.zeros(batch, s.kv_heads, s.tokens, s.dim)
            self.register_buffer(name, held, persistent=False)

    def forward(self, x: Tensor, at: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        s = self.s
        parts = self.qkv(x).split([s.heads * s.dim, s.kv_heads * s.dim, s.kv_heads * s.dim], -1)
        q, k, v = (part.unflatten(-1, (-1, s.dim)).transpose(1, 2) for part in parts)
        self.keys.index_copy_(2, at, _turned(k, *turn))
        self.values.index_copy_(2, at, v)
        q = _turned(q, *turn)
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: the first half of a head's numbers and the second as the two sides of an angle."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Layer(nn.Module):
    def __init__(self, s: Sizes, batch: int) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(s.width), nn.RMSNorm(s.width)
        self.attention = Attention(s, batch)
        self.gate = nn.Linear(s.width, s.hidden, bias=False)
        self.up = nn.Linear(s.width, s.hidden, bias=False)
        self.down = nn.Linear(s.hidden, s.width, bias=False)

    def forward(self, x: Tensor, at: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.attention(self.before(x), at, turn, mask)
        h = self.between(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


class Llama(nn.Module):
    def __init__(self, s: Sizes, batch: int) -> None:
        super().__init__()
        self.s = s
        self.embedding = nn.Embedding(s.vocabulary, s.width)
        self.layers = nn.ModuleList(Layer(s, batch) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.width)
        self.lm_head = nn.Linear(s.width, s.vocabulary, bias=False)
        inverse = ROPE_BASE ** -(torch.arange(0, s.dim, 2, dtype=torch.float32) / s.dim)
        angles = torch.outer(torch.arange(s.tokens, dtype=torch.float32), inverse).repeat(1, 2)
        dtype = torch.get_default_dtype()
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def forward(self, token: Tensor, at: Tensor) -> Tensor:
        x = self.embedding(token)
        mask = (torch.arange(self.s.tokens, device=token.device)[None, :] <= at[:, None])[None, None]
        turn = self.cos[at], self.sin[at]
        for layer in self.layers:
            x = layer(x, at, turn, mask)
        out: Tensor = self.lm_head(self.norm(x))
        return out


def build(s: Sizes, batch: int, device: str) -> Llama:
    """In bfloat16, made on the device; the same numbers for the same sizes."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Llama(s, batch)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    return model.eval()


def inputs(s: Sizes, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """(tokens [B, 1], position [1])"""
    made = torch.Generator(device).manual_seed(1)
    token = torch.randint(0, s.vocabulary, (batch, 1), device=device, generator=made)
    return token, torch.tensor([s.position], device=device)
