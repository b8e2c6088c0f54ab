"""`bf.quantize(algorithm=...)`: block by block, on what rounded blocks give; results kept; bad data first."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_model import Model, codes
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.folded import Folded
from bitfold.passes.algorithms.draft import Draft
from bitfold.passes.algorithms.gptq import GPTQ
from bitfold.passes.algorithms.inputs import Inputs
from bitfold.passes.algorithms.solve import Task

F4 = bf.format("int4[g32]")


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def batches() -> list[Tensor]:
    torch.manual_seed(1)
    mix = torch.randn(8, 32)
    return [torch.randn(4, 20, 8) @ mix + 0.1 * torch.randn(4, 20, 32) for _ in range(4)]


def test_each_layer_sees_what_the_rounded_ones_before_it_give(model: Model, batches: list[Tensor]) -> None:
    """The whole walk by hand: every layer's inputs measured with all layers before it rounded."""
    rounded, expected = copy.deepcopy(model), {}

    def solved(name: str, source: Model) -> Tensor:
        layer, inputs = source.get_submodule(name), Inputs(source.get_submodule(name).weight.shape[1])
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.add(args[0]))
        with torch.no_grad():
            for x in batches:
                source(x)
        handle.remove()
        draft = GPTQ().solve(Task(name, F4, Draft(layer.weight.detach().clone()), inputs))
        expected[f"{name}.weight"] = draft.quantized(F4).codes
        return draft.rounded(F4)

    for i in range(3):
        for group in (("gate", "up"), ("down",)):
            found = {name: solved(f"blocks.{i}.{name}", rounded) for name in group}
            for name, weight in found.items():
                rounded.get_submodule(f"blocks.{i}.{name}").weight.data = weight
    solved("out", model)  # outside the blocks, so measured in the float model
    bf.quantize(model, "int4[g32]", algorithm="gptq", calibration=batches, target="reference")
    for name, found_codes in codes(model).items():
        assert torch.equal(found_codes, expected[name]), name


def test_the_model_is_better_than_rounded(model: Model, batches: list[Tensor]) -> None:
    exact = [model(x).detach() for x in batches]

    def loss(algorithm: str | None) -> float:
        q = copy.deepcopy(model)
        bf.quantize(q, "int3[g32]", algorithm=algorithm, calibration=batches, target="reference")
        return sum(float((q(x) - y).detach().square().mean()) for x, y in zip(batches, exact, strict=True))

    plain = loss(None)
    assert loss("gptq") < 0.7 * plain
    assert loss("clip,gptq,refit") < 0.7 * plain
    assert loss("hqq") < plain


def test_transformers_llama_is_a_chain_of_blocks(batches: list[Tensor]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    llama = LlamaForCausalLM(config).eval()
    assert config.use_cache
    ids = [{"input_ids": torch.randint(64, (2, 64))} for _ in range(2)]
    bf.quantize(llama, "int4[g32]", algorithm="clip,gptq", calibration=ids, target="reference")
    assert config.use_cache
    assert not [miss for miss in bf.report(llama).misses if "blocks" in str(miss)]
    assert isinstance(llama.model.layers[1].mlp.down_proj, Folded)
    assert torch.isfinite(llama(**ids[0]).logits).all()


def test_a_model_without_blocks_is_measured_in_float_and_says_so(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    bf.quantize(plain, "int4[g32]", algorithm="gptq", calibration=batches, target="reference")
    assert "measured in the float model" in str(bf.report(plain))


def test_the_program_scope_solves_too(model: Model, batches: list[Tensor]) -> None:
    exact = model(batches[0])
    plain = bf.quantize(model, "int3[g32]", scope="program", example_inputs=(batches[0],), target="reference")
    solved = bf.quantize(
        model, "int3[g32]", scope="program", algorithm="gptq", calibration=batches, target="reference"
    )
    error = (solved(batches[0]) - exact).square().mean()
    assert error < 0.7 * (plain(batches[0]) - exact).square().mean()


def test_an_interrupted_run_goes_on(
    model: Model, batches: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = copy.deepcopy(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    bf.quantize(whole, "int4[g32]", algorithm="gptq", calibration=batches, target="reference")

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("gptq") and done == 5:
            raise KeyboardInterrupt

    asked: dict[str, Any] = {"algorithm": "gptq", "calibration": batches, "target": "reference"}
    with pytest.raises(KeyboardInterrupt):
        bf.quantize(model, "int4[g32]", **asked, resume=tmp_path / "run", progress=stop)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), "the model is as it was"
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == 5
    solved: list[str] = []
    solve = GPTQ.solve
    monkeypatch.setattr(GPTQ, "solve", lambda self, task: (solved.append(task.layer), solve(self, task))[1])
    bf.quantize(model, "int4[g32]", **asked, resume=tmp_path / "run")
    assert len(solved) == 5  # ten layers in all
    for name, found in codes(model).items():
        assert torch.equal(found, codes(whole)[name]), name
    assert not list((tmp_path / "run").glob("*.part"))


def test_results_of_another_run_are_refused(model: Model, batches: list[Tensor], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"calibration": batches, "target": "reference", "resume": tmp_path}
    bf.quantize(copy.deepcopy(model), "int4[g32]", algorithm="gptq", **asked)
    with pytest.raises(bf.BitfoldError, match="another model, recipe, algorithm, data"):
        bf.quantize(model, "int4[g32]", algorithm="clip,gptq", **asked)
    with pytest.raises(bf.BitfoldError, match="another model, recipe, algorithm, data"):
        bf.quantize(model, "int4[g32]", algorithm="gptq", **{**asked, "calibration": batches[:3]})


def test_bad_data_is_said_before_anything_is_solved(
    model: Model, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPTQ, "solve", lambda self, task: pytest.fail("solving began"))
    before = {name: p.clone() for name, p in model.named_parameters()}

    def refused(calibration: Any, match: str) -> None:
        with pytest.raises(bf.BitfoldError, match=match):
            bf.quantize(model, "int4[g32]", algorithm="gptq", calibration=calibration, target="reference")

    refused(None, "give calibration")
    refused([], "give calibration")
    refused([None, *batches], "calibration batch 0 is a NoneType")
    refused([*batches, batches[0].double()], "calibration batch 4 .* does not go through")
    refused([batches[0].long()], "does not go through")
    refused([*batches, torch.full((1, 4, 32), float("nan"))], "calibration batch 4 has NaN")
    refused([torch.ones(2, 31)], "does not go through")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_layer_that_is_never_reached_is_named(batches: list[Tensor]) -> None:
    class Lazy(Model):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    with pytest.raises(bf.BitfoldError, match="no calibration batch reaches layer out"):
        bf.quantize(Lazy(), "int4[g32]", algorithm="gptq", calibration=batches, target="reference")


def test_numbers_that_overflow_inside_are_named(model: Model, batches: list[Tensor]) -> None:
    with torch.no_grad():
        model.blocks[1].down.bias.fill_(3e38)
        model.blocks[0].down.bias.fill_(3e38)
    with pytest.raises(bf.BitfoldError, match="NaN or infinity"):
        bf.quantize(model, "int4[g32]", algorithm="gptq", calibration=[x * 1e30 for x in batches])


def test_too_few_tokens_are_warned_of(model: Model, batches: list[Tensor]) -> None:
    said = "20 tokens for layers of up to 64 channels"
    asked = {"algorithm": "gptq", "calibration": [batches[0][:1]], "target": "reference"}
    alone = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    for given, scope in ((model, "module"), (alone, "module"), (alone, "program")):
        with pytest.warns(UserWarning, match=said) as seen:
            bf.quantize(copy.deepcopy(given), "int4[g32]", scope=scope, **asked)
        assert [warning.filename for warning in seen] == [__file__]


@pytest.mark.parametrize("algorithm", ["hqq,correct_bias", "learn{steps=1}"])
def test_where_no_moment_is_looked_at_a_token_is_enough(
    model: Model, batches: list[Tensor], algorithm: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bf.quantize(model, "int4[g32]", algorithm=algorithm, calibration=[batches[0][:1]], target="reference")


def test_what_is_no_algorithm_is_said(model: Model) -> None:
    with pytest.raises(bf.BitfoldError, match="'fold' decides no codes; an algorithm is made of awq, clip"):
        bf.quantize(model, "int4[g32]", algorithm="fold", calibration=[])
    with pytest.raises(bf.BitfoldError, match="no pass 'gtpq'"):
        bf.quantize(model, "int4[g32]", algorithm="gtpq", calibration=[])
    with pytest.raises(bf.BitfoldError, match="give algorithm="):
        bf.quantize(model, "int4[g32]", resume="x")


def test_solvers_without_data_need_none(model: Model) -> None:
    plain, found = copy.deepcopy(model), copy.deepcopy(model)
    bf.quantize(plain, "int3[g32]", target="reference")
    bf.quantize(found, "int3[g32]", algorithm="hqq", target="reference")
    assert any(
        not torch.equal(a, b) for a, b in zip(codes(plain).values(), codes(found).values(), strict=True)
    )


def test_inputs_that_a_recipe_rounds_are_rounded_on_the_way(model: Model, batches: list[Tensor]) -> None:
    """Blocks behind see what the quantized model will give them, rounded activations included."""
    asked: dict[str, Any] = {"algorithm": "gptq", "calibration": batches, "target": "reference"}
    both, weights = copy.deepcopy(model), copy.deepcopy(model)
    rule = bf.Rule(weight="int4[g32]", input="int4[row]")
    bf.quantize(both, bf.Recipe("both", (rule,)), **asked)
    bf.quantize(weights, "int4[g32]", **asked)
    one, other = codes(both), codes(weights)
    assert torch.equal(one["blocks.0.gate.weight"], other["blocks.0.gate.weight"])
    assert not torch.equal(one["blocks.1.gate.weight"], other["blocks.1.gate.weight"])
