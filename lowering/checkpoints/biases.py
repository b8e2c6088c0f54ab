"""Biases that a configuration says nothing of: `correct_bias{add=true}` gives them to layers that had none.

In: a model of transformers' classes, and the names of its biases. Out: what its configuration has to say
besides, so that a skeleton made of it has them; a BitfoldError where no configuration of this class can.

    LlamaForCausalLM, all seven linears of a layer with biases  ->  {"attention_bias": True, "mlp_bias": True}
"""

from __future__ import annotations

import copy
from collections.abc import Set
from itertools import combinations
from typing import Any

import torch
from torch import nn

from ...formats import BitfoldError

_WORDS = ("attention_bias", "mlp_bias")


def bias_words(model: nn.Module, biases: Set[str]) -> dict[str, bool]:
    """Empty where the configuration has them already, and for what is no model of transformers."""
    config: Any = getattr(model, "config", None)
    if not biases or not hasattr(model, "save_pretrained") or not hasattr(config, "to_json_string"):
        return {}
    known = [word for word in _WORDS if getattr(config, word, None) is False]
    for count in range(len(known) + 1):
        for words in combinations(known, count):
            said = dict.fromkeys(words, True)
            if biases == _biases_of(model, config, said):
                return said
    strange = min(biases - _biases_of(model, config, {}), default=min(biases))
    raise BitfoldError(
        f"layer {strange.removesuffix('.bias')} has a bias, which no configuration of a "
        f"{type(model).__name__} says; leave add=true out of correct_bias, or keep the model with bf.save"
    )


def _biases_of(model: nn.Module, config: Any, said: dict[str, bool]) -> Set[str]:
    other = copy.deepcopy(config)
    for word, value in said.items():
        setattr(other, word, value)
    made: Any = type(model)
    with torch.device("meta"):
        skeleton = made(other)
    return {name for name, _ in skeleton.named_parameters(remove_duplicate=False) if name.endswith(".bias")}
