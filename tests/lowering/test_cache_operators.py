"""The operators of a cache in codes, in main memory: against float64, compiled, exported, with bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bitfold as bf
from bitfold.codegen.attention import AttentionSpec, cache_format, empty_cache
from bitfold.lowering.kv_cache.attention import decoded

D = 64


def spec_of(k: str = "int8[bf16]", v: str = "int4[g32]", tail: str = "", x: str = "bf16") -> AttentionSpec:
    return AttentionSpec.parse(f"attention 4/2x{D} {x} {cache_format(k, D)} {cache_format(v, D)}{tail}")


def new_tokens(count: int, batch: int = 2, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(batch, 2, count, D).to(dtype) for _ in "kv")
    return k, v


@pytest.mark.parametrize("tail", ["", " mask:bool", " mask:float page:8"])
@pytest.mark.parametrize(("k", "v"), [("int8[bf16]", "int4[g32]"), ("uint4[zero]", "float8_e4m3fn[tensor]")])
def test_attend_against_float64(k: str, v: str, tail: str) -> None:
    spec = spec_of(k, v, tail)
    pages = torch.tensor([[3, 0, 2], [1, 4, 5]]) if spec.page else None
    cache = empty_cache(spec, 6 if spec.page else 2, 24)
    new = new_tokens(24)
    torch.ops.bitfold.cache_write(cache, *new, torch.arange(24)[None], pages, str(spec))
    q = torch.randn(2, 4, 3, D).bfloat16()
    limits = torch.tensor([[1, 0, 24], [5, 6, 7]])
    mask = torch.rand(2, 1, 3, 24) < 0.5 if spec.mask == "bool" else None
    mask = torch.randn(1, 4, 3, 24).bfloat16() if spec.mask == "float" else mask
    y = torch.ops.bitfold.attend(q, cache, limits, mask, pages, str(spec))
    ks, vs = (t.repeat_interleave(2, 1) for t in decoded(spec, cache, pages, torch.float64))
    for given, held, fmt in zip(new, (ks, vs), (spec.k, spec.v), strict=True):
        close = (held[:, ::2] - given.double()).norm() / given.double().norm()
        assert close < {4: 0.15, 8: 0.04}[fmt.element.bits], "what was written is not what is read"
    scores = q.double() @ ks.mT * D**-0.5 + (mask.double() if spec.mask == "float" else 0)
    seen = torch.arange(24) < limits[:, None, :, None]
    seen = seen & mask if spec.mask == "bool" else seen
    want = torch.nan_to_num(scores.masked_fill(~seen, -torch.inf).softmax(-1)) @ vs
    # Everything in float32, and bf16 once.
    assert ((y.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-5).all()
    assert y[0, :, 1].eq(0).all(), "a query that sees nothing"
    assert y.transpose(1, 2).is_contiguous()


class Step(nn.Module):
    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.text, self.names = str(spec), spec.parts
        for name, part in zip(spec.parts, empty_cache(spec, 2, 40), strict=True):
            self.register_buffer(name, part)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        cache = [getattr(self, name) for name in self.names]
        torch.ops.bitfold.cache_write(cache, k, v, at[None], None, self.text)
        return torch.ops.bitfold.attend(q * 2, cache, (at + 1)[None], None, None, self.text) + 1


def step_inputs(at: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, 4, 1, D).bfloat16(), *new_tokens(1), torch.tensor([at]))


def test_compiled_as_one_graph_without_copies_of_the_cache() -> None:
    eager, other = Step(spec_of()), Step(spec_of())
    compiled = torch.compile(other, fullgraph=True)
    for at in (0, 7, 39):
        given = step_inputs(at)
        assert torch.equal(compiled(*given), eager(*given))
    for name in eager.names:
        assert torch.equal(getattr(eager, name), getattr(other, name))
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        _, (code,) = torch._inductor.utils.run_and_get_code(
            torch.compile(other, fullgraph=True), *step_inputs(3)
        )
    (write,) = [line for line in code.splitlines() if "bitfold.cache_write" in line and "torch.ops" in line]
    assert write.split("default(")[1].startswith("[arg"), "the cache is written where it lies"


def test_exported() -> None:
    step, given = Step(spec_of()), step_inputs(5)
    exported = torch.export.export(step, given).module()
    assert torch.equal(exported(*given), Step(spec_of())(*given))


def test_fakes_have_the_strides_of_results() -> None:
    spec = spec_of()
    cache = empty_cache(spec, 2, 16)
    q, limits = torch.randn(2, 4, 3, D).bfloat16(), torch.full((1, 1), 4)
    y = torch.ops.bitfold.attend(q, cache, limits, None, None, str(spec))
    with FakeTensorMode() as mode:
        fakes: Any = [mode.from_tensor(t) for t in (q, *cache, limits)]
        fake = torch.ops.bitfold.attend(fakes[0], fakes[1:-1], fakes[-1], None, None, str(spec))
    assert fake.shape == y.shape and fake.stride() == y.stride() and fake.dtype == y.dtype


def test_no_gradient_is_an_error_when_it_is_computed() -> None:
    spec = spec_of()
    q = torch.randn(2, 4, 1, D).bfloat16().requires_grad_()
    y = torch.ops.bitfold.attend(
        q, empty_cache(spec, 2, 16), torch.ones(1, 1, dtype=torch.int32), None, None, str(spec)
    )
    with pytest.raises(bf.BitfoldError, match="no gradient goes through attention over a KV cache"):
        y.sum().backward()


def refused(match: str, **changed: Any) -> None:
    spec = changed.pop("spec", spec_of())
    given: dict[str, Any] = {
        "q": torch.zeros(2, 4, 1, D).bfloat16(), "cache": empty_cache(spec, 2, 16),
        "limits": torch.ones(1, 1, dtype=torch.int32), "mask": None, "pages": None,
    } | changed  # fmt: skip
    with pytest.raises(bf.BitfoldError, match=match):
        torch.ops.bitfold.attend(*given.values(), str(spec))


def test_bad_input_is_one_sentence() -> None:
    spec = spec_of()
    refused(r"takes q \[B, 4, T, 64\] in bf16, not torch.float32", q=torch.zeros(2, 4, 1, D))
    refused(
        "a cache of .* is k_codes, k_scales, v_codes, v_scales, not 2", cache=empty_cache(spec, 2, 16)[:2]
    )
    refused(r"k_codes of a cache .* \[2, 2, 16, 64\], not", cache=empty_cache(spec_of("int4"), 2, 16))
    refused("the cache has 3 entries and the call 2", cache=empty_cache(spec, 3, 16))
    refused(
        "must be contiguous",
        cache=[t.transpose(1, 2).contiguous().transpose(1, 2) for t in empty_cache(spec, 2, 16)],
    )
    refused(r"limits are integers \[2 or 1, 1 or 1\], not torch.float32", limits=torch.ones(1, 1))
    refused("takes no mask", mask=torch.ones(1, 1, 1, 16, dtype=torch.bool))
    refused("takes a mask", spec=spec_of(tail=" mask:bool"))
    refused(
        r"a mask is \[2 or 1, 4 or 1, 1 or 1, 16\]",
        spec=spec_of(tail=" mask:bool"),
        mask=torch.ones(1, 1, 1, 15, dtype=torch.bool),
    )
    refused(
        "takes a mask of bool, not of torch.float32",
        spec=spec_of(tail=" mask:bool"),
        mask=torch.ones(1, 1, 1, 16),
    )
    refused("takes no table of pages", pages=torch.zeros(2, 1, dtype=torch.int32))
    refused("takes a table of pages", spec=spec_of(tail=" page:16"))
    refused(
        r"the table of pages is integers \[2, pages\]",
        spec=spec_of(tail=" page:16"),
        pages=torch.zeros(3, 1, dtype=torch.int32),
    )
    cache = empty_cache(spec, 2, 16)
    before = [part.clone() for part in cache]
    k, v = new_tokens(1)
    for match, args in (
        (
            r"takes k \[B, 2, T, 64\] in bf16, not torch.float32",
            (k.float(), v.float(), torch.zeros(1, 1, dtype=torch.int64)),
        ),
        ("k and v are of one shape", (k, v[:, :, :0], torch.zeros(1, 1, dtype=torch.int64))),
        (
            r"positions are integers \[2 or 1, 1\], not torch.int64 \[1\]",
            (k, v, torch.zeros(1, dtype=torch.int64)),
        ),
    ):
        with pytest.raises(bf.BitfoldError, match=match):
            torch.ops.bitfold.cache_write(cache, *args, None, str(spec))
    assert all(torch.equal(a, b) for a, b in zip(before, cache, strict=True))


def test_nothing_to_do() -> None:
    spec = spec_of()
    none = torch.ops.bitfold.attend(
        torch.zeros(0, 4, 1, D).bfloat16(),
        empty_cache(spec, 0, 16),
        torch.ones(1, 1, dtype=torch.int32),
        None,
        None,
        str(spec),
    )
    assert none.shape == (0, 4, 1, D)
    k, v = new_tokens(0)
    torch.ops.bitfold.cache_write(
        empty_cache(spec, 2, 16), k, v, torch.zeros(1, 0, dtype=torch.int64), None, str(spec)
    )
