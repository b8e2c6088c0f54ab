"""Attention of a few queries over a cache of floats: values against torch, and which attentions become it."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.codegen.cpp.attention_build import attention_operator
from bitfold.lowering import backend
from bitfold.lowering.kv_cache.few_queries import FEW_QUERIES, few_queries, reference
from bitfold.passes import Trace

SHAPES = [
    # B, H, Hkv, T, S, D
    (1, 9, 3, 1, 128, 64), (2, 8, 2, 3, 37, 32), (1, 4, 4, 16, 65, 96), (3, 6, 1, 2, 1, 16),
    (1, 2, 2, 1, 2051, 128),
]  # fmt: skip
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q with a token's heads side by side, as a model has it, and a cache."""
    b, h, kv, t, s, d = shape
    q = torch.randn(b, t, h, d).transpose(1, 2).to(dtype)
    return q, torch.randn(b, kv, s, d).to(dtype), torch.randn(b, kv, s, d).to(dtype)


def masks(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor | None]:
    b, h, _, t, s, _ = shape
    some = torch.rand(1, 1, t, s) > 0.5
    some[..., 0] = True
    added = torch.randn(b, h, t, s).masked_fill(torch.rand(b, h, t, s) > 0.7, -torch.inf)
    return [None, some, added.to(dtype), torch.ones(s, dtype=torch.bool).expand(b, 1, t, s)]


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Scores are sums of D products: off by (D + 8) u of their magnitude m, weights by twice that, a sum over
    S tokens by S u more, and the result is rounded to its dtype once."""
    torch.manual_seed(0)
    q, k, v = operands(shape, dtype)
    d, s, u = shape[5], shape[4], 2.0**-24
    for mask in masks(shape, dtype):
        y = torch.ops.bitfold.few_queries(q, k, v, mask, d**-0.5)
        exact = reference(q.double(), k.double(), v.double(), mask, d**-0.5)
        group = shape[1] // shape[2]
        m = (q.double().abs() @ k.double().abs().repeat_interleave(group, 1).mT).amax() * d**-0.5
        off = math.expm1(2 * (d + 8) * u * float(m)) + (s + 16) * u
        bound = (off + UNIT[dtype]) * float(v.double().abs().amax())
        assert y.dtype == dtype and y.shape == q.shape
        assert float((y.double() - exact).abs().amax()) <= bound


def test_who_sees_nothing_gets_zeros_and_nan_stays_with_who_sees_it() -> None:
    torch.manual_seed(0)
    q, k, v = operands((1, 2, 1, 3, 20, 32), torch.float32)
    mask = torch.ones(1, 1, 3, 20, dtype=torch.bool)
    mask[0, 0, 1], mask[..., 19] = False, False
    mask[0, 0, 2, 19] = True
    k[..., 19, :] = float("nan")
    y = torch.ops.bitfold.few_queries(q, k, v, mask, 1.0)
    assert torch.equal(y[:, :, 1], torch.zeros_like(y[:, :, 1]))
    assert y[:, :, 2].isnan().all() and y[:, :, 0].isfinite().all()


def test_what_is_behind_the_last_token_is_not_read() -> None:
    q, k, v = operands((1, 3, 1, 1, 64, 32), torch.float32)
    k[:, :, 40:], v[:, :, 40:] = float("nan"), float("nan")
    mask = (torch.arange(64) < 40)[None, None, None]
    y = torch.ops.bitfold.few_queries(q, k, v, mask, 0.5)
    torch.testing.assert_close(y, reference(q, k[:, :, :40], v[:, :, :40], None, 0.5))


def test_either_operator_may_come_first() -> None:
    """One library holds both: loaded for one of them, it builds what the other is asked for."""
    code = """
import torch, bitfold
from bitfold.codegen.attention import AttentionSpec, cache_format, empty_cache
q = torch.zeros(1, 2, 1, 64)
torch.ops.bitfold.few_queries(q, q[:, :1], q[:, :1], None, 1.0)
spec = AttentionSpec(2, 1, 64, "f32", cache_format("int8", 64), cache_format("int8", 64))
y = torch.ops.bitfold.attend_few(q, empty_cache(spec, 1, 8), torch.tensor([[8]]), None, None, str(spec))
assert torch.equal(y, q)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_any_strides() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 4, 32).transpose(1, 2) for _ in range(3))
    wide = torch.randn(2, 4, 32, 5).transpose(2, 3)  # the last dimension is not the innermost
    for keys in (k, wide):
        y = torch.ops.bitfold.few_queries(q, keys, v, None, 0.2)
        torch.testing.assert_close(y, reference(q, keys, v, None, 0.2))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": torch.zeros(1, 2, 8, 48)}, "one shape"),
        ({"q": torch.zeros(1, 3, 1, 32)}, "share those of k evenly"),
        ({"v": torch.zeros(1, 2, 8, 32, dtype=torch.float16)}, "one dtype"),
        ({"mask": torch.ones(1, 1, 1, 7, dtype=torch.bool)}, "a number for each of 8 tokens"),
        ({"mask": torch.ones(1, 1, 1, 8, dtype=torch.int32)}, "of bools, or of q's dtype"),
    ],
)
def test_what_it_does_not_take_is_said(change: dict[str, Any], match: str) -> None:
    attention_operator()
    given = {"q": torch.zeros(1, 4, 1, 32), "k": torch.zeros(1, 2, 8, 32), "v": torch.zeros(1, 2, 8, 32)}
    given |= {"mask": None, "scale": 1.0, **change}
    with pytest.raises(RuntimeError, match=match):
        torch.ops.bitfold.few_queries(*given.values())


class Attends(nn.Module):
    def __init__(self, repeats: bool, **options: Any) -> None:
        super().__init__()
        self.repeats, self.options = repeats, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.repeats:
            k, v = (
                x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]) for x in (k, v)
            )
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return found.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("shape", "options", "taken"),
    [
        ((1, 9, 3, 1, 64, 32), {}, True),
        ((1, 9, 3, 1, 64, 32), {"scale": 0.3, "enable_gqa": True}, True),
        ((1, 9, 3, 17, 64, 32), {}, False),  # a prompt
        ((1, 9, 3, 1, 64, 24), {}, False),  # an odd head
    ],
    ids=str,
)
def test_which_attentions_become_it(shape: tuple[int, ...], options: dict[str, Any], taken: bool) -> None:
    torch.manual_seed(0)
    module = Attends(not options.get("enable_gqa"), **options)
    q, k, v = operands(shape, torch.float32)
    mask = torch.rand(1, 1, shape[3], shape[4]) > 0.5
    mask[..., 0] = True
    gm = bf.capture(module, (q, k, v, mask))
    wanted = gm(q, k, v, mask)
    assert few_queries(gm) == int(taken)
    assert len(gm.graph.find_nodes(op="call_function", target=FEW_QUERIES)) == int(taken)
    names = [str(node.target) for node in gm.graph.nodes if "expand" in str(node.target)]
    assert not (taken and names), "the cache is still repeated"
    gm.recompile()
    torch.testing.assert_close(gm(q, k, v, mask), wanted)


def test_decoding_of_a_compiled_model_is_that_of_the_reference() -> None:
    """Several layers, a static cache, the C++ wrapper and one compiled layer: the same tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=64, num_hidden_layers=4, num_attention_heads=6, vocab_size=96,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    traces: list[Trace] = []
    torch._dynamo.reset()
    fast, slow = (
        torch.compile(model, backend=backend.bitfold, dynamic=False, options=options)
        for options in ({"recipe": "int8", "trace": traces}, {"recipe": "int8", "target": "reference"})
    )
    found = []
    with torch.inference_mode():
        for run in (fast, slow):
            cache = transformers.StaticCache(config=config, max_cache_len=32)
            tokens, logits = torch.arange(8)[None].repeat(2, 1), []
            for _ in range(6):
                out = run(tokens, past_key_values=cache, use_cache=True).logits[:, -1]
                tokens = out.argmax(-1, keepdim=True)
                logits.append(out)
            found.append(torch.stack(logits))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert len(traces) == 2
