"""Keys and values that train rounded as a KV cache rounds them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitfold as bf
from bitfold.formats.gradient import Gradient
from bitfold.lowering.kv_cache.attention import decoded, parsed
from bitfold.lowering.qat.caches import SettleCache, TrainCache
from bitfold.passes import Pipeline, snapshot
from bitfold.passes.recipes import Recipe
from bitfold.passes.stages import find_attribute

B, HEADS, KV, S, HD = 2, 4, 2, 24, 64
CACHES = ["kv_int8", "kv_int4", "kv_fp8"]


class Attention(nn.Module):
    """Attention over a static cache, or over the sequence alone, as one trains it."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.cached = cached
        self.qkv = nn.Linear(64, (HEADS + 2 * KV) * HD, bias=False)
        self.out = nn.Linear(HEADS * HD, 64, bias=False)
        if cached:
            for name in "kv":
                self.register_buffer(name, torch.zeros(B, KV, S, HD), persistent=False)

    def forward(self, x: Tensor, at: Tensor | None, mask: Tensor | None) -> Tensor:
        t = x.shape[1]
        q, k, v = (
            y.view(B, t, -1, HD).transpose(1, 2)
            for y in self.qkv(x).split([HEADS * HD, KV * HD, KV * HD], -1)
        )
        if self.cached:
            self.k[:, :, at] = k
            self.v[:, :, at] = v
            k, v = self.k, self.v
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(B, t, HEADS * HD))


class Net(nn.Module):
    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.cached = cached
        self.layers = nn.ModuleList(Attention(cached) for _ in range(2))

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        mask = None
        if self.cached:
            mask = (torch.arange(S, device=x.device)[None, :] <= at[:, None])[None, None]
        for layer in self.layers:
            x = x + layer(x, at, mask)
        return x


def made(cached: bool) -> Net:
    torch.manual_seed(0)
    return Net(cached).eval()


def recipe(cache: str, linears: str = "int4[g32]") -> Recipe:
    return Recipe.parse(linears).but(*Recipe.parse(cache).rules, name="both")


def program(model: nn.Module, what: Recipe, *args: Any, **options: Any) -> Any:
    return bf.prepare_qat(model, what, scope="program", example_inputs=args, **options)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("alone", [False, True], ids=["with int4", "alone"])
def test_without_a_cache_keys_and_values_train_rounded(cache: str, alone: bool) -> None:
    x = torch.randn(B, 6, 64)
    what = Recipe.parse(cache) if alone else recipe(cache)
    gm = program(made(False), what, x)
    text = str(snapshot(gm))
    fmt = Recipe.parse(cache).rules[0].weight
    assert text.count("train_quantize") == (4 if alone else 8) and text.count(f"'{fmt}'") >= 4
    gm.train()
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(gm(x), x.flip(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    gm.eval()
    with torch.no_grad():
        expected = gm(x)
        assert torch.equal(bf.convert(gm, target="reference")(x), expected)


class Latent(nn.Module):
    """Keys are the values; other readers of those numbers (the query, who calls) read them as they are."""

    def __init__(self, repeats: str) -> None:
        super().__init__()
        self.repeats, self.fc = repeats, nn.Linear(64, 2 * HD)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.fc(x).view(*x.shape[:2], 2, HD).transpose(1, 2)
        return self.attention(h, h), h

    def attention(self, h: Tensor, q: Tensor) -> Tensor:
        """h: keys and values."""
        if self.repeats == "no":
            return F.scaled_dot_product_attention(q, h, h)
        k = h.repeat_interleave(2, 1)
        q = q.repeat_interleave(2, 1) if self.repeats == "keys" or q is not h else k
        y = F.scaled_dot_product_attention(q, k, k)
        return F.scaled_dot_product_attention(y, k, k)


@pytest.mark.parametrize("repeats", ["no", "keys", "all"])
@pytest.mark.parametrize("cache", ["kv_int8", "kv_int4"])
def test_only_keys_and_values_are_rounded_and_once(cache: str, repeats: str) -> None:
    torch.manual_seed(0)
    model, x = Latent(repeats).eval(), torch.randn(B, 6, 64)
    gm = program(model, Recipe.parse(cache), x).eval()
    with torch.no_grad():
        ours, h = gm(x)
        assert torch.equal(h, model(x)[1])
        rounded = bf.format(Recipe.parse(cache).rules[0].weight).fake_quantize(h)
        assert torch.equal(ours, model.attention(rounded, h))
    assert str(snapshot(gm)).count("train_quantize") == 1


def test_keys_and_values_train_in_floats_during_warmup() -> None:
    x, model = torch.randn(B, 6, 64), made(False)
    floats = model(x)
    for what in (recipe("kv_int4"), Recipe.parse("kv_int4")):
        gm = program(model, what, x, options=bf.Qat(warmup=1)).train()
        assert torch.equal(gm(x), floats)
        bf.advance(gm)
        assert not torch.equal(gm(x), floats)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_becomes_codes_of_the_numbers_that_were_trained_on(cache: str) -> None:
    gm = program(made(True), recipe(cache), torch.randn(B, 3, 64), torch.arange(3)).eval()
    codes = bf.convert(gm, target="reference")
    assert "cache_write" in str(snapshot(codes)) and "train_quantize" not in str(snapshot(codes))
    write = next(
        iter(codes.graph.find_nodes(op="call_function", target=torch.ops.bitfold.cache_write.default))
    )
    spec, parts = parsed(write.args[5]), [find_attribute(codes, str(part.target)) for part in write.args[0]]
    with torch.no_grad():
        for at in (torch.arange(3), torch.arange(3, 6), torch.arange(6, 9)):
            x = torch.randn(B, len(at), 64)
            ours, theirs = codes(x, at), gm(x, at)
            k, v = decoded(spec, parts, None, torch.float32)
            # What the first layer holds is the same in every bit. Attention over codes is another kernel:
            # 64 and then 24 terms of float32 in another order, 88 * 2**-24 of numbers below 8, two layers.
            assert torch.equal(k[:, :, : at[-1] + 1], gm.get_buffer("layers.0.k")[:, :, : at[-1] + 1])
            assert torch.equal(v[:, :, : at[-1] + 1], gm.get_buffer("layers.0.v")[:, :, : at[-1] + 1])
            assert torch.allclose(ours, theirs, atol=2 * 88 * 2**-24 * 8)


@pytest.mark.parametrize("cache", CACHES)
def test_trained_without_a_cache_it_runs_with_one(cache: str) -> None:
    """The same state in a program with caches: token by token it says what it learned to say of the whole."""
    how = bf.Qat("lsq")
    x = torch.randn(B, 6, 64)
    gm = program(made(False), recipe(cache), x, options=how).train()
    optimizer = torch.optim.Adam(bf.parameter_groups(gm, lr=1e-2, scale_lr=1e-3))
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(gm(x), x.flip(1)).backward()
        optimizer.step()
    step = torch.randn(B, 1, 64), torch.tensor([0])
    decoder = program(made(True), recipe(cache), *step, options=how, state=gm.state_dict()).eval()
    codes = bf.convert(decoder, target="reference")
    with torch.no_grad():
        whole = gm.eval()(x)
        for at in range(6):
            token = codes(x[:, at : at + 1], torch.tensor([at]))
            # Sums of 64 and 256 terms in another order, through two layers; a code may go the other way where
            # a number is near a tie, which moves one key by a step.
            assert (token - whole[:, at : at + 1]).abs().mean() < 1e-3


def test_what_is_left_is_reported_or_refused() -> None:
    x = torch.randn(B, 6, 64)
    with pytest.raises(bf.BitfoldError, match="found nothing"):
        bf.prepare_qat(nn.Linear(4, 4), "kv_int8", scope="program", example_inputs=(torch.randn(2, 4),))
    rule = bf.Rule(op="cache", weight="int8[tensor]")
    with pytest.raises(bf.BitfoldError, match="no cache"):
        program(made(False), Recipe("one", (rule,)), x)
    skipping = recipe("kv_int8").but(bf.Rule(match="layers.0*", op="cache", skip="the first is sensitive"))
    assert str(snapshot(program(made(False), skipping, x))).count("'int8[bf16]'") == 2


def test_the_passes_are_text_as_others_are() -> None:
    passes = Pipeline([TrainCache("kv_int8", Gradient.parse("clip+stochastic"), 3), SettleCache("kv_int8")])
    assert Pipeline.parse(str(passes)).passes == passes.passes
    train = Pipeline.parse("train_cache{recipe=kv_int8,gradient=straight}")
    gm = bf.capture(made(False), (torch.randn(B, 6, 64),))
    train.run(gm)
    assert str(snapshot(gm)).count("train_quantize") == 4
