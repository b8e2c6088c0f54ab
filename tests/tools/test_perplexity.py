"""Perplexity against numbers worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from bitfold import BitfoldError
from bitfold.tools.perplexity import perplexity


class Fixed(nn.Module):
    """Gives the next token after t probability p if it is t + 1, and shares the rest among the others."""

    def __init__(self, words: int, p: float) -> None:
        super().__init__()
        self.words, self.p = words, p
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        likely = torch.full((*input_ids.shape, self.words), math.log((1 - self.p) / (self.words - 1)))
        likely.scatter_(-1, (input_ids[..., None] + 1) % self.words, math.log(self.p))
        return SimpleNamespace(logits=likely + 3.0)  # logits have no fixed sum


def test_uniform_is_the_number_of_words() -> None:
    assert perplexity(Fixed(8, 1 / 8), torch.zeros(3, 5, dtype=torch.int64)) == pytest.approx(8, rel=1e-6)


def test_the_first_token_of_a_window_is_not_judged() -> None:
    # Each window: one step that follows (probability 0.5), one that does not (0.5 / 7).
    tokens = torch.tensor([[1, 2, 2], [5, 6, 0]])
    want = math.exp(-(math.log(0.5) + math.log(0.5 / 7)) / 2)
    assert perplexity(Fixed(8, 0.5), tokens) == pytest.approx(want, rel=1e-6)


def test_progress_and_shapes() -> None:
    seen: list[tuple[int, int]] = []
    perplexity(Fixed(4, 0.5), torch.zeros(2, 3, dtype=torch.int64), progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]
    for wrong in (torch.zeros(5), torch.zeros(2, 1)):
        with pytest.raises(BitfoldError, match=r"tokens must be \[windows, length >= 2\]"):
            perplexity(Fixed(4, 0.5), wrong)
