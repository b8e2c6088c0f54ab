"""Perplexity: how surprised a language model is by real text, as one number.

In: a causal language model and token ids, int64 [windows, length]. Out: exp of the mean negative log
likelihood of every token but the first of each window, each window read by itself.

    perplexity(model, pydoc_tokens(tokenizer))   ->   15.7751

Logits are taken to float32 and the sum is kept in float64, so that two models whose weights agree give
numbers that agree to the last digit printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import BitfoldError


def perplexity(model: Any, tokens: Tensor, *, progress: Callable[[int, int], None] | None = None) -> float:
    """`progress` is called with (windows done, windows). Raises BitfoldError for tokens of a wrong shape.

    One window at a time: a window of 512 tokens makes 100 MB of float32 logits with 49152 words."""
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise BitfoldError(f"tokens must be [windows, length >= 2], not {list(tokens.shape)}")
    device = next(model.parameters()).device
    total = 0.0
    with torch.inference_mode():
        for done, window in enumerate(tokens, 1):
            row = window[None].to(device)
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, row[0, 1:], reduction="sum"))
            if progress is not None:
                progress(done, len(tokens))
    return math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))
