"""What a reviewer broke in algorithms and calibration: silent wrong numbers first. A test for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.act = nn.RMSNorm(width), F.relu
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Net(nn.Module):
    """Tokens through blocks to logits; what a subclass does between blocks is what breaks."""

    def __init__(self, block: Callable[[], nn.Module] = Block, count: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.head = nn.Linear(32, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = self.between(block(x))
        return self.head(x)

    def between(self, x: Tensor) -> Tensor:
        return x


def made(cls: Callable[..., Net] = Net, *args: Any, **kwargs: Any) -> Net:
    torch.manual_seed(0)
    return cls(*args, **kwargs).eval()


def data(count: int = 8, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randint(50, (2, 24)) for _ in range(count)]


def quantized(model: nn.Module, algorithm: str, recipe: str = "int3[g32]", **kwargs: Any) -> nn.Module:
    kwargs.setdefault("calibration", data())
    return bf.quantize(copy.deepcopy(model), recipe, algorithm=algorithm, target="reference", **kwargs)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---- a chain of blocks that is none ----


class Inside(Net):
    def between(self, x: Tensor) -> Tensor:
        x += 3.0
        return x


class Outside(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + 3.0


def test_a_value_that_is_changed_in_place_between_blocks_is_no_chain() -> None:
    assert same(quantized(made(Inside), "gptq"), quantized(made(Outside), "gptq"))
    with pytest.raises(bf.BitfoldError, match="not given what the one before it returned"):
        quantized(made(Inside), "learn")


class Beside(Block):
    """A second residual, which one block hands to the next."""

    def forward(self, x: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rest = rest + x
        return self.down(self.act(self.up(self.norm(rest)))), rest


class BesideInPlace(Beside):
    def forward(self, x: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rest += x
        return self.down(self.act(self.up(self.norm(rest)))), rest


class Two(Net):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        rest = torch.zeros_like(x)
        for block in self.blocks:
            x, rest = block(x, rest)
        return self.head(x + rest)


@pytest.mark.parametrize("block", [Beside, BesideInPlace])
def test_a_second_value_from_block_to_block_is_no_chain(block: type[Block]) -> None:
    with pytest.raises(bf.BitfoldError, match=r"more than one result|writes to what it is given"):
        quantized(made(Two, block), "gptq,learn{steps=5}")
    assert same(quantized(made(Two, Beside), "gptq"), quantized(made(Two, BesideInPlace), "gptq"))


class Wrapped(nn.Module):
    """A transformers model inside another, which has no configuration."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm(input_ids=ids).logits


def test_a_model_inside_fills_no_cache_either() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes)).eval()
    for algorithm in ("gptq", "gptq,learn{steps=5}"):
        assert same(quantized(lm, algorithm), quantized(Wrapped(lm), algorithm))
    assert lm.config.use_cache
    asked = [{"input_ids": ids, "use_cache": True} for ids in data()]
    with pytest.raises(bf.BitfoldError, match="cache, which each run of it would add to"):
        quantized(lm, "gptq,learn{steps=5}", calibration=asked)


# ---- what runs leave behind, and what resume knows ----


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * self.calls)


def test_buffers_are_as_they_were() -> None:
    from bitfold.lowering.search.sensitivity import sensitivity

    model = made(Net, Counting)
    table = sensitivity(model, data(2), ("int8[g32]", "int3[g32]"))
    assert float(model.blocks[0].calls) == 0
    # Each layer is measured from the same state, so the finest format hardly moves the output.
    assert all(one.loss < 0.01 for one in table.choices if one.format == "int8[g32]")
    assert float(quantized(model, "gptq").blocks[0].calls) == 0
    static = bf.quantize(copy.deepcopy(model), "int8_static", calibration=data(2))
    assert float(static.blocks[0].calls) == 0


@pytest.mark.parametrize("algorithm", ["gptq,learn{steps=5}", "awq,clip,gptq,learn{steps=5}", "gptq"])
def test_a_run_that_was_killed_between_files_of_a_block_goes_on_alike(algorithm: str, tmp_path: Path) -> None:
    model = made()
    whole = quantized(model, algorithm, resume=tmp_path)
    assert same(whole, quantized(model, algorithm))
    files = sorted(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    for count in range(len(files)):
        for path in files[count:]:
            path.unlink(missing_ok=True)
        assert same(whole, quantized(model, algorithm, resume=tmp_path)), count


def test_another_function_or_number_in_a_module_is_another_run(tmp_path: Path) -> None:
    model = made()
    quantized(model, "gptq", resume=tmp_path)
    for change in (lambda b: setattr(b, "act", F.silu), lambda b: setattr(b, "scale", torch.tensor(3.0))):
        other = copy.deepcopy(model)
        change(other.blocks[0])
        with pytest.raises(bf.BitfoldError, match="of another model"):
            quantized(other, "gptq", resume=tmp_path)
    quantized(copy.deepcopy(model), "gptq", resume=tmp_path)


# ---- layers that are called in other ways ----


class Expert(nn.Module):
    """Each token goes to one of two."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 32)
        first = flat[:, 0] > 1.3  # now and then no token's is
        out = torch.empty_like(flat)
        out[first], out[~first] = self.experts[0](flat[first]), self.experts[1](flat[~first])
        return x + out.reshape(x.shape)


def some_empty() -> list[Tensor]:
    """Batches that send tokens to both experts, and one that sends none to the first."""
    model, found = made(Net, Expert), data(12)
    with torch.no_grad():
        reached = [bool((model.embed(ids)[..., 0] > 1.3).any()) for ids in found]
    lonely = torch.full((2, 24), int(model.embed.weight[:, 0].argmin()))
    assert any(reached)
    return [*(ids for ids, one in zip(found, reached, strict=True) if one), lonely]


@pytest.mark.parametrize("turned", [False, True])
def test_an_expert_without_tokens_in_a_batch(turned: bool) -> None:
    batches = some_empty()[:: -1 if turned else 1]
    model = made(Net, Expert)
    for algorithm in ("correct_bias", "gptq,learn{steps=8}", "gptq,tune{steps=8}"):
        q = quantized(model, algorithm, "int4[g32]", calibration=batches)
        assert all(torch.isfinite(q(ids)).all() for ids in batches)


def test_a_users_hooks_are_no_rounding_error() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    for hook in ("after", "before"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
        if hook == "after":
            model[0].register_forward_hook(lambda module, args, result: result + 5)
        else:
            model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2 + 1,))
        q = bf.quantize(copy.deepcopy(model), "int8", algorithm="correct_bias", calibration=[x])
        assert float((q(x) - model(x)).norm() / model(x).norm()) < 0.01


class ByName(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(input=self.act(self.up(input=self.norm(x))))


@pytest.mark.parametrize("algorithm", ["awq", "smooth", "gptq"])
@pytest.mark.parametrize("recipe", ["int3[g32]", "int8_dynamic"])
def test_linears_that_are_called_by_keyword(algorithm: str, recipe: str) -> None:
    one, other = (quantized(made(Net, block), algorithm, recipe) for block in (Block, ByName))
    assert same(one, other)


class Cross(nn.Module):
    """Weights of its own and two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(32, 32) / 6) for _ in range(2))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(first, self.q), F.linear(second, self.k)


class Crossed(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.cross, self.named = Cross(), named

    def forward(self, x: Tensor) -> Tensor:
        loud = 10 * x.roll(1, -1).relu()
        one, other = self.cross(second=loud, first=x) if self.named else self.cross(x, loud)
        return one + other


def test_keywords_in_another_order_than_the_signatures() -> None:
    torch.manual_seed(0)
    model, batches = Crossed(named=False).eval(), [torch.randn(16, 32) for _ in range(4)]
    twin = Crossed(named=True).eval()
    twin.load_state_dict(model.state_dict())
    one, other = (quantized(m, "gptq", calibration=batches) for m in (model, twin))
    assert same(one, other)


class Fused(nn.Module):
    """A norm and a linear in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.w = nn.Parameter(torch.rand(32) + 0.5), nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(F.rms_norm(x, (32,)) * self.g, self.w)


def test_what_is_no_plain_linear_is_not_balanced() -> None:
    q = quantized(made(Net, Fused), "awq,gptq")
    assert "is of no plain linear" in str(bf.report(q))


def test_blocks_of_one_class_may_differ_in_what_they_hold() -> None:
    for acts in ((F.relu, F.gelu), (F.gelu, F.relu)):
        model = made()
        for block, act in zip(model.blocks, acts, strict=True):
            block.act = act
        plain, even = (quantized(model, name) for name in ("hqq", "equalize,hqq"))
        for act, one, other in zip(acts, plain.blocks, even.blocks, strict=True):
            # Rows of `up` may be scaled through a relu, and not through a gelu.
            assert torch.equal(one.down.weight, other.down.weight) == (act is F.gelu)


def test_a_tied_weight_is_decided_once_and_blocks_are_measured_behind_what_is_stored() -> None:
    model = made(count=3)
    model.blocks[2].up.weight = model.blocks[0].up.weight
    q = quantized(model, "gptq")
    assert torch.equal(q.blocks[2].up.weight, q.blocks[0].up.weight)
    said = str(bf.report(q))
    assert "its weight is that of blocks.0.up too, where gptq has decided its codes" in said
    alone = copy.deepcopy(model)
    alone.blocks[0].up.weight = nn.Parameter(model.blocks[0].up.weight.detach().clone())
    assert torch.equal(quantized(alone, "gptq").blocks[0].up.weight, q.blocks[0].up.weight)


# ---- ranges, orders, options ----


class Reciprocal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(1 / x)


@pytest.mark.parametrize("observer", ["minmax", "average", "moving", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("scope", ["module", "program"])
def test_infinity_inside_a_model_has_no_range(observer: str, scope: str) -> None:
    x = torch.randn(8, 16)
    x[0, 0] = 0
    recipe = bf.Recipe("s", (bf.Rule(weight="int8", input="int8[tensor]", observer=observer),))
    with pytest.raises(bf.BitfoldError, match=r"NaN or infinity (goes into|comes to the input of) layer"):
        bf.quantize(Reciprocal(), recipe, calibration=[torch.randn(8, 16), x], scope=scope)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ("gptq,clip", "clip decides scales and would throw away the codes of gptq; put it before gptq"),
        ("gptq,descend,refit,clip", "put it before refit"),
        ("gptq,hqq", "put it before gptq"),
        ("gptq,follow", "put it before gptq"),
        ("clip,refit", "refit wants codes that are decided; put gptq before it"),
        ("clip{norm=nan}", "positive norm"),
        ("hqq{beta=nan}", "beta > 0"),
        ("gptq,descend{damping=nan}", "damping of 0 or more"),
        ("gptq,refit{damping=-5.0}", "damping of 0 or more"),
    ],
)
def test_wrong_orders_and_options_are_said_before_any_work(algorithm: str, said: str) -> None:
    with pytest.raises(bf.BitfoldError, match=said):
        bf.quantize(made(), "int3[g32]", algorithm=algorithm, calibration=[])
