"""Greedy decoding of a Llama with a static cache, compiled so that thirty layers take no longer than one.

In: a `LlamaForCausalLM` (as it is, or quantized in place) and a prompt. Out: one token a step.

    decoder = Decoder(model, batch=1, length=128)
    token = decoder.read(prompt)           the prompt, uncompiled
    decoder.compile()
    token = decoder.step(token)            one token, compiled

All layers are alike (`bf.quantize` gives modules that are alike one body), so one compiled function serves
them all: compiling the whole model as one graph takes Inductor ten times as long, most of it Python going
thirty times over the same layer. The bitfold backend finds for itself what repeats, and on a CPU, where
calling a compiled function takes as long as a layer's attention, it gets the whole step. On a GPU the whole
step, all layers, becomes one CUDA graph, since launching kernels one by one would take longer than they do.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..formats import BitfoldError


class LayerCache:
    """Keys and values of one layer, [batch, heads, length, size]. Takes the place of transformers' cache,
    which looks a layer up by its number: a number would tell the compiler that no two layers are alike."""

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        self.keys, self.values, self.position = keys, values, position

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write at `position` and return all; what is not written yet is masked. What else attention hands
        over differs between versions of transformers, and nothing here depends on it."""
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


Held = dict[str, LayerCache]
"""A layer's cache, under the word by which the layer takes it."""


class Decoder:
    """One sequence of steps. `position` [1] is where the next token goes; it grows in place."""

    def __init__(self, model: Any, *, batch: int, length: int) -> None:
        self.model: Any = model
        self.inner: Any = model.model if hasattr(model, "model") else model
        if not all(hasattr(self.inner, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
            raise BitfoldError(
                f"decoding is timed for models built like Llama, and {type(model).__name__} is not"
            )
        norm = self.inner.norm.weight
        self.length = length
        self.position = torch.zeros(1, dtype=torch.int64, device=norm.device)
        self.caches = [self._cache(batch, norm) for _ in self.inner.layers]
        # What a layer calls its cache: another word from transformers 5.24 on, which warns of the old one.
        known = inspect.signature(type(self.inner.layers[0]).forward).parameters
        word = "cache" if "cache" in known else "past_key_values"
        self._held = [{word: cache} for cache in self.caches]
        self._begin: Any = _begin
        self._layer: Any = _layer
        self._end: Any = _end
        self._whole: Any = None

    def _cache(self, batch: int, like: Tensor) -> LayerCache:
        config = self.model.config
        shape = (batch, config.num_key_value_heads, self.length, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        return LayerCache(keys, values, self.position)

    def read(self, prompt: Tensor) -> Tensor:
        """The whole prompt [batch, n] at once, uncompiled; the token that follows, [batch, 1]."""
        positions = torch.arange(prompt.shape[1], device=prompt.device)
        for cache in self.caches:
            cache.position = positions
        token = self._pass(prompt, positions)
        for cache in self.caches:
            cache.position = self.position
        self.position.fill_(prompt.shape[1])
        return token

    def compile(self, backend: str | None = None) -> None:
        """Compile a step, in three pieces or whole; it happens in the next call of `step`. backend: Inductor,
        or "bitfold", which puts the operations around a quantized model's kernels into them."""
        torch._dynamo.reset()  # each decoder compiles anew, and Dynamo limits how often one function may be
        pieces = (_begin, _layer, _end)
        how: dict[str, Any] = {"backend": backend, "options": {"recipe": "none"}} if backend else {}
        if backend == "bitfold" and self.position.device.type == "cpu":
            self._whole = torch.compile(_step, fullgraph=True, dynamic=False, **how)
            return
        self._begin, self._layer, self._end = (
            torch.compile(piece, fullgraph=True, dynamic=False, **how) for piece in pieces
        )

    def step(self, token: Tensor) -> Tensor:
        """The token after `token` [batch, 1]."""
        if self._whole is not None:
            after: Tensor = self._whole(self.model, self.inner, token, self.position, self.length, self._held)
        else:
            after = self._pass(token, self.position)
        self.position.add_(1)
        return after

    def _pass(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x, mask, cos, sin = self._begin(self.inner, tokens, positions, self.length)
        for layer, held in zip(self.inner.layers, self._held, strict=True):
            x = self._layer(layer, x, mask, cos, sin, held)
        return self._end(self.model, x)  # type: ignore[no-any-return]

    def graph(self, token: Tensor) -> GraphedStep:
        """The step as one CUDA graph, from `token` on. `step` must have run compiled."""
        return GraphedStep(self, token)


class GraphedStep:
    """A recorded step: replaying it reads and writes the same memory each time."""

    def __init__(self, decoder: Decoder, token: Tensor) -> None:
        self._token = token.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._token.copy_(decoder.step(self._token))

    def __call__(self, token: Tensor) -> Tensor:
        """The token after the last one; `token` must be the one that the last call returned."""
        del token
        self._graph.replay()
        return self._token.clone()


def _step(
    model: Any,
    inner: Any,
    tokens: Tensor,
    positions: Tensor,
    length: int,
    caches: list[dict[str, LayerCache]],
) -> Tensor:
    x, mask, cos, sin = _begin(inner, tokens, positions, length)
    for layer, held in zip(inner.layers, caches, strict=True):
        x = _layer(layer, x, mask, cos, sin, held)
    return _end(model, x)


def _begin(inner: Any, tokens: Tensor, positions: Tensor, length: int) -> tuple[Tensor, ...]:
    x = inner.embed_tokens(tokens)
    cos, sin = inner.rotary_emb(x, position_ids=positions[None])
    mask = torch.arange(length, device=tokens.device)[None, :] <= positions[:, None]
    return x, mask[None, None], cos, sin


def _layer(layer: Any, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, held: Held) -> Tensor:
    out: Tensor = layer(x, attention_mask=mask, position_embeddings=(cos, sin), **held)
    return out


def _end(model: Any, x: Tensor) -> Tensor:
    logits = model.lm_head(model.model.norm(x[:, -1:]))
    return logits[:, -1].argmax(-1, keepdim=True)  # type: ignore[no-any-return]
