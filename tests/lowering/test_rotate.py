"""Rotations: the same function, no loud channels, and a sentence for models that would notice."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.passes import Miss, capture
from bitfold.passes.algorithms.residual import residual

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from small_llama import Size, SmallLlama

SIZE = Size(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=32,
)


def llama(loud: float = 1.0) -> SmallLlama:
    """A decoder with norms that are not all ones, and with a few channels of the stream `loud` times as
    large."""
    torch.manual_seed(0)
    model = SmallLlama(SIZE).eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2))
            parameter += 1 if parameter.ndim == 1 else 0
        model.model.embed_tokens.weight[:, :3] *= loud
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:3] *= loud
            layer.mlp.down_proj.weight[:3] *= loud
    return model


def ids(seed: int = 1) -> list[Tensor]:
    return list(torch.randint(64, (4, 2, 32), generator=torch.Generator().manual_seed(seed)))


def error(model: SmallLlama, recipe: bf.Recipe | str, algorithm: str | None) -> float:
    q, fresh = copy.deepcopy(model), ids(2)
    bf.quantize(q, recipe, algorithm=algorithm, calibration=ids(), target="reference")
    return float(sum((q(x) - model(x)).detach().square().mean() for x in fresh))


def test_the_stream_of_a_decoder_is_found() -> None:
    stream = residual(capture(llama(), (ids()[0],)))
    assert not isinstance(stream, Miss)
    assert stream.width == 48 and stream.embeddings == ["model.embed_tokens.weight"]
    layer = "model.layers.1."
    assert stream.readers[layer + "mlp.up_proj.weight"] == layer + "post_attention_layernorm.weight"
    assert stream.readers["lm_head.weight"] == "model.norm.weight"
    assert len(stream.readers) == 2 * 5 + 1
    assert sorted(stream.writers) == sorted(
        f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    )


def test_the_model_computes_what_it_did() -> None:
    model = llama()
    fine = bf.Recipe("fine", (bf.Rule(weight="int8[g16]"),))
    plain, rotated = error(model, fine, None), error(model, fine, "rotate,clip")
    exact = float(sum(model(x).detach().square().mean() for x in ids(2)))
    assert rotated < 2e-3 * exact and rotated < 2 * plain


def test_loud_channels_cost_int4_activations_less() -> None:
    """The reason to exist: with three channels thirty times as large, a token's scale is theirs alone."""
    model = llama(loud=30.0)
    recipe = bf.Recipe("w8a4", (bf.Rule(weight="int8", input="int4[row]"),))
    plain = error(model, recipe, None)
    assert error(model, recipe, "rotate{online=false},clip") < 0.5 * plain
    assert error(model, recipe, "rotate,clip") < 0.5 * plain


def test_a_transform_that_is_run_each_time() -> None:
    model = llama()
    q = copy.deepcopy(model)
    bf.quantize(q, "int8[g16]", algorithm="rotate,gptq", calibration=ids(), target="reference")
    down = q.model.layers[0].mlp.down_proj
    assert any(n.target is torch.ops.bitfold.hadamard.default for n in down.body.graph.nodes)
    assert down.weight.shape == (48, 96)  # as it is applied to what comes in, without the transform
    x = torch.randn(5, 96)
    assert torch.allclose(down(x), x @ down.weight.mT, atol=2e-4)
    assert torch.equal(q.model.norm.weight, torch.ones(48))


@pytest.mark.parametrize("algorithm", ["rotate,awq,clip,gptq", "rotate,clip,gptq,learn{steps=20}"])
def test_others_work_on_the_rotated_model(algorithm: str) -> None:
    model = llama(loud=10.0)
    assert error(model, "int4[g16]", algorithm) < error(model, "int4[g16]", None)


def test_a_rotated_model_is_saved_and_loaded(tmp_path: Path) -> None:
    q = copy.deepcopy(llama())
    bf.quantize(q, "int8[g16]", algorithm="rotate,gptq", calibration=ids(), target="reference")
    bf.save(q, tmp_path / "model.safetensors")
    again = bf.load(tmp_path / "model.safetensors", into=llama())
    assert torch.equal(q(ids()[0]), again(ids()[0]))


def test_a_tied_head_becomes_its_own() -> None:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert error(model, "int8[g16]", "rotate,clip") < 1.0
    q = copy.deepcopy(model)
    skipping = bf.Recipe(
        "body", (bf.Rule(weight="int8[g16]"), bf.Rule(match="lm_head", skip="the head stays"))
    )
    bf.quantize(q, skipping, algorithm="rotate,clip", calibration=ids(), target="reference")
    assert q.lm_head.weight is not q.model.embed_tokens.weight
    assert error(model, skipping, "rotate,clip") < 2 * error(model, skipping, None)
    with pytest.raises(bf.BitfoldError, match="untie them first"):
        bf.quantize(model, "int8_all", algorithm="rotate,clip", calibration=ids(), target="reference")


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_llama_too(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    exact = model(ids()[0]).logits
    bf.quantize(
        model,
        bf.Recipe("body", (bf.Rule(weight="int8[g16]"), bf.Rule(match="lm_head", skip="it stays"))),
        algorithm="rotate,clip",
        calibration=[{"input_ids": one} for one in ids()],
        target="reference",
    )
    assert float((model(ids()[0]).logits - exact).detach().norm() / exact.detach().norm()) < 0.02
    assert not model.config.tie_word_embeddings  # or saving it would tie the two again


class Noticing(nn.Module):
    """A stream with a layer norm, which takes the mean of channels off."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(64, 48), nn.LayerNorm(48)
        self.blocks = nn.ModuleList([nn.Linear(48, 48), nn.Linear(48, 48)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for block in self.blocks:
            x = x + block(self.norm(x))
        return x


def test_a_model_that_would_notice_is_told_so() -> None:
    model = Noticing()
    with pytest.raises(bf.BitfoldError, match=r"layer_norm.*would notice a rotation"):
        bf.quantize(model, "int4[g16]", algorithm="rotate,gptq", calibration=ids(), target="reference")
    assert type(model.blocks[0]) is nn.Linear
    with pytest.raises(bf.BitfoldError, match="put it first"):
        bf.quantize(model, "int4[g16]", algorithm="gptq,rotate", calibration=ids(), target="reference")
    with pytest.raises(bf.BitfoldError, match="scope='module'"):
        bf.quantize(model, "int4[g16]", algorithm="rotate,gptq", calibration=ids(), scope="program")


def test_given_codes_are_not_rotated() -> None:
    model = llama()
    path = "model.layers.0.mlp.up_proj.weight"
    codes = {path: bf.format("int8").quantize(model.get_parameter(path).detach())}
    recipe = bf.Recipe("stored", (bf.Rule(weight="stored", on_misfit="report"),))
    with pytest.raises(bf.BitfoldError, match="cannot be rotated; leave rotate out"):
        bf.quantize(
            model, recipe, algorithm="rotate,clip", calibration=ids(), stored=codes, target="reference"
        )


def test_the_cpu_target_runs_the_transform() -> None:
    model = llama()
    fast, slow = copy.deepcopy(model), copy.deepcopy(model)
    bf.quantize(fast, "int8[g16]", algorithm="rotate,gptq", calibration=ids(), target="cpu")
    bf.quantize(slow, "int8[g16]", algorithm="rotate,gptq", calibration=ids(), target="reference")
    with torch.no_grad():
        exact = slow(ids()[0])
        torch.testing.assert_close(fast(ids()[0]), exact, rtol=1e-3, atol=1e-3)
        compiled = torch.compile(slow, backend="aot_eager")
        torch.testing.assert_close(compiled(ids()[0]), exact, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_for_others_refuses_the_transform(tmp_path: Path) -> None:
    q = llama()
    bf.quantize(q, "int8", algorithm="rotate,clip", calibration=ids(), target="reference")
    with pytest.raises(bf.BitfoldError, match=r"down_proj|o_proj"):
        bf.save_checkpoint(q, tmp_path / "out")
