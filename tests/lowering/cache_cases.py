"""Models with a static cache, for tests of quantize_cache: each way to write, repeat and mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitfold as bf

B, HEADS, KV, S, HD = 2, 4, 2, 24, 64


class Attention(nn.Module):
    """Attention over a static cache; `write` and `read` are how it is written and repeated."""

    def __init__(self, write: str = "put", read: str = "gqa", dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.write, self.read = write, read
        self.qkv = nn.Linear(64, (HEADS + 2 * KV) * HD, bias=False)
        self.out = nn.Linear(HEADS * HD, 64, bias=False)
        for name in "kv":
            self.register_buffer(name, torch.randn(B, KV, S, HD), persistent=False)
        self.to(dtype)

    def forward(self, x: Tensor, at: Tensor, mask: Any = None, causal: bool = False) -> Tensor:
        t = x.shape[1]
        q, k, v = (
            y.view(B, t, -1, HD).transpose(1, 2)
            for y in self.qkv(x).split([HEADS * HD, KV * HD, KV * HD], -1)
        )
        keys, values = self.k, self.v
        if self.write == "put":
            self.k[:, :, at] = k
            self.v[:, :, at] = v
        elif self.write == "index_copy":
            self.k.index_copy_(2, at, k)
            self.v.index_copy_(-2, at, v)
        elif self.write == "slice":
            self.k[:, :, 3 : 3 + t] = k
            self.v[:, :, -S + 3 : 3 + t] = v
        elif self.write == "functional":
            keys, values = self.k.index_copy(2, at, k), self.v.index_copy(2, at, v)
            self.k.copy_(keys)
            self.v.copy_(values)
        elif self.write == "scatter":
            keys = torch.slice_scatter(self.k, k, 2, 3, 3 + t)
            values = torch.slice_scatter(self.v, v, 2, 3, 3 + t)
            self.k.copy_(keys)
            self.v.copy_(values)
        elif self.write == "twice":
            self.k[:, :, at] = k
            self.k[:, :, at + 1] = k
            self.v[:, :, at] = v
        elif self.write == "apart":
            self.k[:, :, at] = k
            self.v[:, :, at + 1] = v
        elif self.write == "also read":
            self.k[:, :, at] = k
            self.v[:, :, at] = v
            q = q + self.k.mean()
        if self.read == "interleave":
            keys, values = (y.repeat_interleave(HEADS // KV, 1) for y in (keys, values))
        elif self.read == "expand":
            keys, values = (
                y[:, :, None].expand(-1, -1, HEADS // KV, -1, -1).reshape(B, HEADS, S, HD)
                for y in (keys, values)
            )
        y = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=self.read == "gqa"
        )
        return self.out(y.transpose(1, 2).reshape(B, t, HEADS * HD))


class Net(nn.Module):
    """Two layers under one mask, as `mask` says."""

    def __init__(self, write: str = "put", read: str = "gqa", mask: str = "prefix", **kwargs: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(write, read, **kwargs) for _ in range(2))
        self.mask = mask

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        counted, mask, causal = torch.arange(S, device=x.device), None, self.mask == "causal"
        if self.mask == "prefix":
            mask = (counted[None, :] <= at[:, None])[None, None]
        elif self.mask == "greater":
            mask = (at[None, None, :, None] + 1) > counted.view(1, 1, 1, S)
        elif self.mask == "window":
            mask = (counted[None, :] <= at[:, None]) & (counted[None, :] > at[:, None] - 5)
        elif self.mask == "added":
            mask = torch.where(counted[None, :] <= at[:, None], 0.0, float("-inf"))[None].to(x.dtype)
        for layer in self.layers:
            x = x + layer(x, at, mask, causal)
        return x


def inputs(at: list[int]) -> tuple[Tensor, Tensor]:
    return torch.randn(B, len(at), 64).bfloat16(), torch.tensor(at)


def quantized(net: nn.Module, recipe: Any = "kv_int8", count: int = 1) -> Any:
    with torch.no_grad():
        return bf.quantize(
            net, recipe, scope="program", example_inputs=inputs([3, 4, 5][:count]), target="cpu"
        )


def compare(net: nn.Module, program: Any, steps: list[list[int]], tolerance: float = 0.01) -> None:
    """The program's outputs follow the model's, step by step."""
    with torch.no_grad():
        for at in steps:
            given = inputs(at)
            want, got = net(*given), program(*given)
            error = (got - want).float().norm() / want.float().norm()
            assert 0 < error < tolerance, f"{at}: {error:.2g}"
