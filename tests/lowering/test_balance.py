"""AWQ, SmoothQuant, equalization: what they find in a block, that it stays the same, why they exist."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_model import Model, codes
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf
from bitfold.passes.algorithms.balance import groups


def outliers(count: int = 4, width: int = 32) -> list[Tensor]:
    """Activations of which three channels are much larger, as in large language models."""
    torch.manual_seed(1)
    scale = torch.ones(width)
    scale[:3] = torch.tensor([40.0, 25.0, 60.0])
    return [torch.randn(4, 20, width) * scale for _ in range(count)]


@pytest.fixture
def loud() -> Model:
    """A model whose norms make some channels loud."""
    torch.manual_seed(0)
    model = Model(blocks=2).eval()
    for block in model.blocks:
        block.norm.weight.data[:3] = torch.tensor([30.0, 20.0, 50.0])
        block.gate.weight.data[:, :3] /= 30
        block.up.weight.data[:, :3] /= 30
    return model


def loss(model: Model, recipe: Any, algorithm: str | None) -> float:
    batches = outliers()
    exact = [model(x).detach() for x in batches]
    q = copy.deepcopy(model)
    # What is outside the blocks is not balanced, and reads loud channels as they are.
    recipe = bf.Recipe.parse(recipe).but(bf.Rule(match="out", skip="outside the blocks"))
    bf.quantize(q, recipe, algorithm=algorithm, calibration=batches, target="reference")
    return sum(float((q(x) - y).detach().square().mean()) for x, y in zip(batches, exact, strict=True))


def test_groups_of_transformers_llama() -> None:
    """Four heads of queries over two of values, whose rows serve two heads each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    llama = LlamaForCausalLM(config).eval()
    seen: list[Any] = []
    layer = llama.model.layers[0]
    layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        llama(torch.randint(64, (2, 8)), use_cache=False)
    layer._forward_pre_hooks.clear()
    args, kwargs = seen[0]
    found = groups(bf.capture(layer, args, kwargs=kwargs))
    assert [(group.readers, [one.path for one in group.producers]) for group in found] == [
        (
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            ["input_layernorm.weight"],
        ),
        (("self_attn.o_proj.weight",), ["self_attn.v_proj.weight"]),
        (("mlp.gate_proj.weight", "mlp.up_proj.weight"), ["post_attention_layernorm.weight"]),
        (("mlp.down_proj.weight",), ["mlp.up_proj.weight"]),
    ]
    assert found[1].index is not None and found[1].width == 16
    assert found[1].index[:16] == (*range(8), *range(8))


def test_the_benchmark_s_decoder_has_the_same_groups() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from small_llama import Size, SmallLlama

    model = SmallLlama(Size(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)).eval()
    cos, sin = model.model.cos[:8], model.model.sin[:8]
    found = groups(bf.capture(model.model.layers[0], (torch.randn(2, 8, 32), cos, sin)))
    assert [len(group.readers) for group in found] == [3, 1, 2, 1]
    for algorithm in ("awq,gptq", "smooth", "equalize"):
        q = copy.deepcopy(model)
        ids = [torch.randint(64, (4, 32)) for _ in range(2)]
        bf.quantize(q, "int8[g16]", algorithm=algorithm, calibration=ids, target="reference")
        assert torch.allclose(q(ids[0]), model(ids[0]), atol=2e-2)


def test_a_channel_that_something_else_reads_is_left() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            z = self.a(y)
            return self.b(torch.sigmoid(z)) + y  # the residual reads y, and a sigmoid bends channels

    assert groups(bf.capture(Both(), (torch.randn(2, 8),))) == []


def test_relu_keeps_channels_apart() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    (group,) = groups(bf.capture(net, (torch.randn(2, 8),)))
    assert group.readers == ("2.weight",)
    assert [(one.path, one.kind) for one in group.producers] == [("0.weight", "rows"), ("0.bias", "vector")]


@pytest.mark.parametrize("algorithm", ["awq", "smooth", "equalize"])
def test_the_model_computes_what_it_did(loud: Model, algorithm: str) -> None:
    """In a format fine enough that only a mistake would show: 1 / 254 of the largest number of 8."""
    x = outliers()[0]
    exact = loud(x).detach()
    norm = loud.blocks[0].norm.weight.detach().clone()
    bf.quantize(loud, "int8[g8]", algorithm=algorithm, calibration=outliers(), target="reference")
    assert float((loud(x) - exact).norm() / exact.norm()) < 0.02
    moved = not torch.equal(loud.blocks[0].norm.weight, norm)
    assert moved == (algorithm != "equalize")  # which has rows to look at, not vectors


def test_awq_rounds_loud_channels_finely(loud: Model) -> None:
    assert loss(loud, "int3[g32]", "awq") < 0.6 * loss(loud, "int3[g32]", None)
    assert loss(loud, "int3[g32]", "awq,gptq") < loss(loud, "int3[g32]", "awq")


def test_smoothing_spares_the_scale_of_tokens(loud: Model) -> None:
    """int8 activations with a scale a token: the loud channels take all of its steps."""
    recipe = bf.Recipe("w8a4", (bf.Rule(weight="int8[row]", input="int4[row]"),))
    assert loss(loud, recipe, "smooth") < 0.6 * loss(loud, recipe, None)


def test_static_ranges_are_those_of_smoothed_channels(loud: Model) -> None:
    recipe = bf.Recipe("static", (bf.Rule(weight="int8[row]", input="int8[tensor]", observer="minmax"),))
    assert loss(loud, recipe, "smooth") < 0.5 * loss(loud, recipe, None)


def test_equalization_saves_a_scale_of_the_whole_tensor() -> None:
    torch.manual_seed(0)
    model = Model(blocks=2).eval()
    for block in model.blocks:
        block.up.weight.data *= torch.logspace(-1.5, 1.5, 64)[:, None]
        block.down.weight.data /= torch.logspace(-1.5, 1.5, 64)
    assert loss(model, "int4[tensor]", "equalize") < 0.3 * loss(model, "int4[tensor]", None)


def test_half_precision_norms_are_made_up_for(loud: Model) -> None:
    """A bfloat16 norm cannot hold w / s; the columns take the factor that it came to."""
    loud = loud.bfloat16()
    x = outliers()[0].bfloat16()
    exact = loud(x).float().detach()
    halves = [y.bfloat16() for y in outliers()]
    bf.quantize(loud, "int8[g8]", algorithm="smooth", calibration=halves, target="reference")
    assert float((loud(x).float() - exact).norm() / exact.norm()) < 0.03


def test_a_norm_that_stays_float_is_written_last(loud: Model) -> None:
    before = {name: p.clone() for name, p in loud.named_parameters()}

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("fold"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bf.quantize(
            loud, "int4[g32]", algorithm="awq", calibration=outliers(), target="reference", progress=stop
        )
    x = outliers()[0]
    # Norms are written by then, so the layers that are still float have been scaled to match.
    other = Model(blocks=2).eval()
    other.load_state_dict(before)
    error = (loud(x) - other(x)).norm() / other(x).norm()
    assert float(error) < 0.2


def test_balancing_comes_before_codes(loud: Model) -> None:
    with pytest.raises(bf.BitfoldError, match="put it before gptq"):
        bf.quantize(loud, "int4[g32]", algorithm="gptq,awq", calibration=outliers())
    with pytest.raises(bf.BitfoldError, match="scope='module'"):
        bf.quantize(loud, "int4[g32]", algorithm="awq", calibration=outliers(), scope="program")
    with pytest.raises(bf.BitfoldError, match="this model is none"):
        bf.quantize(nn.Sequential(nn.Linear(32, 32)), "int4[g32]", algorithm="awq", calibration=outliers())


def test_resumed_after_balancing(loud: Model, tmp_path: Path) -> None:
    whole, asked = copy.deepcopy(loud), {"algorithm": "awq,gptq", "calibration": outliers()}
    bf.quantize(whole, "int4[g32]", target="reference", **asked)

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("awq") and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bf.quantize(loud, "int4[g32]", target="reference", resume=tmp_path, progress=stop, **asked)
    bf.quantize(loud, "int4[g32]", target="reference", resume=tmp_path, **asked)
    for name, found in codes(whole).items():
        assert torch.equal(found, codes(loud)[name]), name
    assert torch.equal(F.relu(whole.blocks[0].norm.weight), F.relu(loud.blocks[0].norm.weight))


def test_channels_of_codes_that_were_given_stay() -> None:
    """Scaling a norm whose reader has codes of its own would change what the codes are multiplied by."""
    torch.manual_seed(0)
    model = Model().eval()
    path = "blocks.0.gate.weight"
    given = {path: bf.format("int8").quantize(model.get_parameter(path).detach())}
    stored = bf.Rule(match="blocks.0.gate", weight="stored")
    recipe = bf.Recipe("given", (bf.Rule(weight="int8"), stored))
    batches = [torch.randn(4, 20, 32) for _ in range(2)]
    exact = model(batches[0]).detach()
    bf.quantize(model, recipe, algorithm="smooth", calibration=batches, stored=given, target="reference")
    assert float((model(batches[0]).detach() - exact).norm() / exact.norm()) < 0.02
    assert "codes of its own" in str(bf.report(model))
