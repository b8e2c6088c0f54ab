"""What a run of an algorithm must not do silently: take for a chain of blocks what is none, take up what is
of another run, throw away what was decided."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf
from bitfold.lowering.algorithms.places import Whole, work
from bitfold.lowering.outputs import first_output
from bitfold.passes import Pipeline
from bitfold.passes.algorithms.gptq import GPTQ
from bitfold.passes.algorithms.on_model import OnModel
from bitfold.passes.observing.batch import as_batch


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


class BesideInPlace(Block):
    """A second residual, which one block hands to the next."""

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


def test_a_block_that_writes_to_its_second_value_is_no_link_of_a_chain() -> None:
    """One that returns another one is (test_chains.py)."""
    with pytest.raises(bf.BitfoldError, match=r"writes to what it is given"):
        quantized(made(Two, BesideInPlace), "gptq,learn{steps=5}")


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


@pytest.mark.parametrize(
    ("algorithm", "recipe"),
    [
        ("gptq,learn{steps=5}", "int3[g32]"),
        ("gptq,learn{steps=5}", "int8_dynamic"),
        ("awq,clip,gptq,learn{steps=5}", "int3[g32]"),
        ("gptq", "int3[g32]"),
    ],
)
def test_a_run_that_was_killed_between_files_of_a_block_goes_on_alike(
    algorithm: str, recipe: str, tmp_path: Path
) -> None:
    model = made()
    whole = quantized(model, algorithm, recipe, resume=tmp_path)
    assert same(whole, quantized(model, algorithm, recipe))
    files = sorted(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    for count in range(len(files)):
        for path in files[count:]:
            path.unlink(missing_ok=True)
        assert same(whole, quantized(model, algorithm, recipe, resume=tmp_path)), count


def test_another_function_or_number_in_a_module_is_another_run(tmp_path: Path) -> None:
    model = made()
    quantized(model, "gptq", resume=tmp_path)
    for change in (lambda b: setattr(b, "act", F.silu), lambda b: setattr(b, "scale", torch.tensor(3.0))):
        other = copy.deepcopy(model)
        change(other.blocks[0])
        with pytest.raises(bf.BitfoldError, match="of another model"):
            quantized(other, "gptq", resume=tmp_path)
    quantized(copy.deepcopy(model), "gptq", resume=tmp_path)


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


# ---- orders, options ----


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ("gptq,clip", "clip decides scales and would throw away the codes of gptq; put it before gptq"),
        ("gptq,descend,refit,clip", "put it before refit"),
        ("gptq,hqq", "put it before gptq"),
        ("gptq,follow", "put it before gptq"),
        ("clip,refit", "refit wants codes that are decided; put gptq before it"),
        ("clip{norm=nan}", "positive norm"),
        ("clip{norm=inf}", "positive norm"),
        ("hqq{beta=nan}", "beta > 0"),
        ("hqq{growth=inf}", "growth >= 1"),
        ("gptq,descend{damping=nan}", "damping of 0 or more"),
        ("gptq,refit{damping=-5.0}", "damping of 0 or more"),
    ],
)
def test_wrong_orders_and_options_are_said_before_any_work(algorithm: str, said: str) -> None:
    with pytest.raises(bf.BitfoldError, match=said):
        bf.quantize(made(), "int3[g32]", algorithm=algorithm, calibration=[])


def test_stored_codes_are_what_later_layers_are_decided_behind() -> None:
    recipe = bf.Recipe("r", (bf.Rule("*.up", weight="int2[g32]"), bf.Rule("*.down", weight="int4[g32]")))
    ids = [torch.randint(50, (4, 40), generator=torch.Generator().manual_seed(1)) for _ in range(3)]
    stored = {
        f"blocks.{i}.up.weight": bf.format("int2[g32]").quantize(block.up.weight.detach())
        for i, block in enumerate(made().blocks)
    }
    found = []
    for rounded in (False, True):
        net = made()
        for path, codes in stored.items() if rounded else ():
            net.get_parameter(path).data = codes.dequantize()
        found.append(bf.quantize(net, recipe, algorithm="gptq", calibration=ids, stored=stored).state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


class Heads(Net):
    """Its largest list is read in parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(32, 512) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return torch.cat([head(x) for head in self.heads], -1)


class Nested(Net):
    """Lists of blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([Block(), Block()]) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for stage in self.blocks:
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
        return self.head(x)


@pytest.mark.parametrize("algorithm", ["gptq", "learn{steps=1}"])
@pytest.mark.parametrize(("kind", "dropped"), [(Heads, ["heads"]), (Nested, [])])
def test_lists_that_are_no_chain_are_left_out(kind: type[Net], dropped: list[str], algorithm: str) -> None:
    ids = [torch.randint(50, (4, 40), generator=torch.Generator().manual_seed(1)) for _ in range(3)]
    net = bf.quantize(made(kind), "int4[g32]", algorithm=algorithm, calibration=ids)
    said = [miss for miss in bf.report(net).misses if "measured in the float model" in miss.reason]
    assert [miss.module_path for miss in said] == dropped


@dataclass(frozen=True)
class Odd(OnModel):
    name: ClassVar[str] = "odd"
    place: ClassVar[Any] = "model after"


@dataclass(frozen=True)
class Misplaced(Odd):
    place: ClassVar[Any] = "after block"


@pytest.mark.parametrize(
    ("step", "changes", "sentence"),
    [
        (Misplaced(), {}, "has the place 'after block'; places are model before"),
        (Odd(), None, "nothing is registered for odd"),
        (Odd(), {"norm.wieght": torch.ones(32)}, "'norm.wieght', and the model has no such parameter"),
        (Odd(), {"blocks.0.norm.weight": torch.ones(32), "blocks.1.norm.weight": 3.0}, "a float of no"),
        (Odd(), {"blocks.0.up.weight": torch.ones(32, 32)}, "folded; decide the codes of layer blocks.0.up"),
        (Odd(), {"blocks.0.norm.weight": torch.ones(31)}, r"shape \[31\], and the parameter has \[32\]"),
    ],
)
def test_mistakes_of_own_passes_change_nothing(
    step: Odd, changes: dict[str, Any] | None, sentence: str
) -> None:
    def do(step: Odd, at: Whole) -> None:
        at.changes |= changes or {}

    kind = type("Own", (type(step),), {})  # registered for this case alone
    if changes is not None:
        work.register(kind, do)
    net = made()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ids = [torch.arange(50).reshape(2, 25)]
    with pytest.raises(bf.BitfoldError, match=sentence):
        bf.quantize(net, "int4[g32]", algorithm=Pipeline([GPTQ(), kind()]), calibration=ids)
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class Configured(Net):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(scale=scale)

    def between(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * self.config.scale
        return scaled


def test_a_configuration_of_another_value_is_another_run(tmp_path: Path) -> None:
    ids = [torch.arange(50).reshape(2, 25)]
    for again in range(2):
        bf.quantize(made(Configured, 1.0), "int4[g32]", algorithm="gptq", calibration=ids, resume=tmp_path)
        assert again or len(list(tmp_path.iterdir())) > 1
    with pytest.raises(bf.BitfoldError, match="another"):
        bf.quantize(made(Configured, 50.0), "int4[g32]", algorithm="gptq", calibration=ids, resume=tmp_path)


@pytest.mark.parametrize("algorithm", ["clip,gptq", "learn{steps=1}", "smooth"])
def test_attention_whose_last_linear_is_only_read(algorithm: str) -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    batches = [torch.randn(4, 20, 32)]
    q = bf.quantize(net.eval(), "int4[g32]", algorithm=algorithm, calibration=batches)
    assert sum(layer.path.endswith("out_proj") for layer in bf.report(q).layers) == 2
    said = [miss for miss in bf.report(q).misses if "no such statistics" in miss.reason]
    assert len(said) == (2 if "gptq" in algorithm else 0)


def test_logits_of_a_dictionary_are_the_output() -> None:
    class Named(Net):
        def forward(self, ids: Tensor) -> Any:
            logits = super().forward(ids)
            return {"loss": logits.mean(), "logits": logits}

    assert first_output(made(Named), as_batch(torch.arange(6).reshape(2, 3), "it")).shape == (2, 3, 50)
