"""Caches in codes as a user has them: recipes, rules, files, scopes, compiled, in a model of transformers."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from cache_cases import HD, B, Net, compare, inputs, quantized
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.kv_cache import attention


@pytest.mark.parametrize(
    ("recipe", "tolerance", "share"),
    [("kv_int8", 0.01, 66 / 128), ("kv_int4", 0.1, 36 / 128), ("kv_fp8", 0.03, 66 / 128)],
)
def test_recipes(recipe: str, tolerance: float, share: float) -> None:
    """Bytes of the caches against bf16, for 64 numbers: codes, and a scale of two bytes, or two of them."""
    net = Net().eval()
    program = quantized(copy.deepcopy(net), recipe)
    compare(net, program, [[3], [9], [23]], tolerance)
    caches = sum(t.nbytes for name, t in program.named_buffers())
    assert caches == pytest.approx(share * sum(t.nbytes for t in net.buffers()), rel=1e-6)


def test_together_with_weights_saved_and_loaded(tmp_path: Path) -> None:
    net = Net().eval()
    recipe = bf.Recipe.parse("int8").but(bf.Rule(op="cache", weight="int8[bf16]"))
    program = quantized(copy.deepcopy(net), recipe)
    compare(net, program, [[3], [4]], 0.03)
    bf.save(program, tmp_path / "program.safetensors")
    again = bf.load(tmp_path / "program.safetensors")
    given = inputs([6])
    with torch.no_grad():
        assert torch.equal(again(*given), program(*given))


def test_what_was_in_the_cache_stays() -> None:
    net = Net("slice").eval()
    for layer in net.layers:
        nn.init.normal_(layer.k, std=3.0)  # type: ignore[arg-type]
    compare(net, quantized(copy.deepcopy(net)), [[20]])


def test_keys_and_values_have_rules_of_their_own() -> None:
    recipe = bf.Recipe(
        "mixed",
        (
            bf.Rule("*.k", op="cache", weight="int8[bf16]"),
            bf.Rule("*.v", op="cache", weight="int4[g32]"),
            bf.Rule("layers.1.*", op="cache", skip="the last layer is sensitive"),
        ),
    )
    net = Net().eval()
    program = quantized(copy.deepcopy(net), recipe)
    names = {name for name, _ in program.named_buffers()}
    assert {"layers_0_k_codes", "layers_0_v_codes"} <= names and "layers.1.k" in names
    assert program.layers_0_v_codes.shape[-1] == HD // 2 and program.layers_0_k_codes.shape[-1] == HD
    assert any("the last layer is sensitive" in str(miss) for miss in bf.report(program).misses)


def test_weights_alone_leave_caches() -> None:
    program = quantized(Net().eval(), bf.Recipe("all", (bf.Rule(op="*", weight="int8"),)))
    assert any("scaled_dot_product" in str(n.target) for n in program.graph.nodes)


def test_a_rule_that_names_no_cache_is_reported() -> None:
    rules = (bf.Rule(op="cache", weight="int8[bf16]"), bf.Rule("layers.0.kk", op="cache", skip="x"))
    program = quantized(Net().eval(), bf.Recipe("typo", rules))
    assert any(
        "no cache matches this rule; did you mean 'layers.0.k'" in str(m) for m in bf.report(program).misses
    )


def test_module_scope_says_where_caches_are_seen() -> None:
    net = Net().eval()
    with pytest.raises(
        bf.BitfoldError, match=r"found nothing to quantize .*put it in codes by scope='program'"
    ):
        bf.quantize(net, "kv_int8")
    recipe = bf.Recipe.parse("int8").but(bf.Rule(op="cache", weight="int8[bf16]"))
    bf.quantize(net, recipe)
    assert any("scope='program'" in str(miss) for miss in bf.report(net).misses)
    assert net.layers[0].k.dtype == torch.bfloat16


def test_frame_scope_leaves_the_users_buffers() -> None:
    net = Net().eval()
    recipe = bf.Recipe.parse("int8").but(bf.Rule(op="cache", weight="int8[bf16]"))
    with torch.no_grad(), pytest.warns(UserWarning, match="in torch.compile a buffer is the user's"):
        torch.compile(net, backend="bitfold", options={"recipe": str(recipe), "target": "reference"})(
            *inputs([3])
        )
    assert net.layers[0].k.dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_program() -> None:
    net = Net().eval()
    program, other = quantized(copy.deepcopy(net)), quantized(copy.deepcopy(net))
    compiled = torch.compile(other, fullgraph=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at in (3, 4):
            given = inputs([at])
            torch.testing.assert_close(compiled(*given), program(*given), rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers_with_its_static_cache() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, vocab_size=200, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.generation_config = transformers.GenerationConfig(
        use_cache=True, cache_implementation="static", max_length=64,
        cache_config={"batch_size": 1, "max_cache_len": 64},
    )  # fmt: skip

    def given(token: int, at: int) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[token]]), "cache_position": torch.tensor([at])}

    with torch.no_grad():
        program = bf.quantize(
            TorchExportableModuleWithStaticCache(model), "kv_int8", scope="program", target="cpu",
            example_inputs=given(5, 0),
        )  # fmt: skip
        texts = [str(n.args[-1]) for n in program.graph.nodes if n.target is torch.ops.bitfold.attend.default]
        assert len(texts) == 2 and not any("mask" in text for text in texts)
        net = TorchExportableModuleWithStaticCache(model)
        for at, token in enumerate((5, 7, 9, 11)):
            want, got = net(**given(token, at)), program(**given(token, at))
            assert (got - want).float().norm() < 0.02 * want.float().norm()


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [("kv_int8", torch.float32), ("kv_int4", torch.bfloat16), ("kv_fp8", torch.float32)],
    ids=str,
)
def test_on_a_cpu_a_compiled_step_reads_and_writes_the_codes(
    recipe: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, the write is Inductor's and the attention a kernel: the same codes, no operator in Python."""
    torch.manual_seed(0)
    net = Net(dtype=dtype, read="expand").eval()
    programs = []
    for _ in range(2):
        one = Net(dtype=dtype, read="expand").eval()
        one.load_state_dict(net.state_dict())
        for ours, theirs in zip(one.buffers(), net.buffers(), strict=True):
            ours.copy_(theirs)
        example = (torch.randn(B, 1, 64, dtype=dtype), torch.tensor([3]))
        programs.append(bf.quantize(one, recipe, scope="program", example_inputs=example, target="cpu"))
    eager, other = programs
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="bitfold", options={"recipe": "none"})
    with torch.inference_mode():
        for at in (0, 5, 11):
            given = torch.randn(B, 1, 64, dtype=dtype), torch.tensor([at])
            wanted = eager(*given)
            with monkeypatch.context() as here:
                for name in ("cache_write_on_cpu", "attend_on_cpu"):
                    here.setattr(attention, name, None)
                found = compiled(*given)
            close = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(found, wanted, rtol=close, atol=close)
    for ours, theirs in zip(other.buffers(), eager.buffers(), strict=True):
        # A sum of another order may put a number on the other side of a step: by one, and seldom.
        differ = (ours != theirs).float().mean() if ours.numel() else torch.zeros(())
        assert differ < 0.02
