"""Decoding a layer at a time says what transformers says; bytes count once; a trial leaves the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bitfold import BitfoldError
from bitfold.lowering import quantize
from bitfold.tools.measure import Decoding, decode, time_calls, weight_bytes
from bitfold.tools.smollm2 import SmolLM2
from bitfold.tools.trial import Bench, shared_copy

transformers = pytest.importorskip("transformers")


def tiny() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.5,  # so that greedy choices are far apart
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_tied_weights_weigh_once() -> None:
    model = tiny()
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64
    inverse_frequencies = 2 * 8
    assert weight_bytes(model) == 4 * (96 * 64 + 3 * layer + 64 + inverse_frequencies)


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_is_what_generate_says(batch: int) -> None:
    model = tiny()
    prompt = torch.randint(1, 96, (batch, 7))
    want = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, min_new_tokens=9, do_sample=False
    )
    got = decode(model, prompt, steps=8, compiled=False)
    assert got.tokens.tolist() == want[:, 7:].tolist()


def test_compiled_decoding_of_a_quantized_model_compiles_each_piece_once() -> None:
    model = quantize(tiny(), "int8_all")
    prompt = torch.randint(1, 96, (1, 5))
    want = decode(model, prompt, steps=12, compiled=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = decode(model, prompt, steps=12)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert got.compile_seconds > got.step_seconds > 0


def test_speed_is_of_the_whole_batch() -> None:
    assert Decoding(torch.zeros(8, 5), 1.0, 0.04).tokens_per_second == 200


def test_errors_of_use() -> None:
    with pytest.raises(BitfoldError, match="ask for 4 at least"):
        decode(tiny(), torch.ones(1, 3, dtype=torch.int64), steps=3)
    with pytest.raises(BitfoldError, match="models built like Llama, and Sequential is not"):
        decode(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 3, dtype=torch.int64), steps=8)


def test_any_model_can_be_timed() -> None:
    calls = time_calls(nn.Linear(8, 8), (torch.zeros(2, 8),), calls=4)
    assert calls.compile_seconds > calls.step_seconds > 0


def test_a_quantized_copy_leaves_the_model_alone() -> None:
    base = tiny()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    copy = shared_copy(base)
    assert copy.model.norm.weight is base.model.norm.weight
    bench = Bench.of(SmolLM2(base, None, {}), torch.randint(0, 96, (2, 16)), torch.device("cpu"))
    small, seconds = bench.quantized("int8_all", lambda *_: None)
    assert seconds > 0
    assert weight_bytes(small) < 0.4 * weight_bytes(base)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    same, none = bench.quantized("none", lambda *_: None)
    assert none == 0 and weight_bytes(same) == weight_bytes(base)
