"""The pass quantize_cache: which buffers become codes, what the graph is then, and what is left and why."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.kv_cache import attention
from bitfold.lowering.kv_cache.quantize import QuantizeCache
from bitfold.passes import Pipeline, state

B, HEADS, KV, S, HD = 2, 4, 2, 24, 64


class Attention(nn.Module):
    """Attention over a static cache; `write` and `read` are how it is written and repeated."""

    def __init__(self, write: str = "put", read: str = "gqa", dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.write, self.read = write, read
        self.qkv = nn.Linear(64, (HEADS + 2 * KV) * HD, bias=False)
        self.out = nn.Linear(HEADS * HD, 64, bias=False)
        for name in "kv":
            self.register_buffer(name, torch.randn(B, KV, S, HD), persistent=False)
        self.to(dtype)

    def forward(self, x: Tensor, at: Tensor, mask: Any = None, causal: bool = False) -> Tensor:
        t = x.shape[1]
        q, k, v = (
            y.view(B, t, -1, HD).transpose(1, 2)
            for y in self.qkv(x).split([HEADS * HD, KV * HD, KV * HD], -1)
        )
        keys, values = self.k, self.v
        if self.write == "put":
            self.k[:, :, at] = k
            self.v[:, :, at] = v
        elif self.write == "index_copy":
            self.k.index_copy_(2, at, k)
            self.v.index_copy_(-2, at, v)
        elif self.write == "slice":
            self.k[:, :, 3 : 3 + t] = k
            self.v[:, :, -S + 3 : 3 + t] = v
        elif self.write == "functional":
            keys, values = self.k.index_copy(2, at, k), self.v.index_copy(2, at, v)
            self.k.copy_(keys)
            self.v.copy_(values)
        elif self.write == "scatter":
            keys = torch.slice_scatter(self.k, k, 2, 3, 3 + t)
            values = torch.slice_scatter(self.v, v, 2, 3, 3 + t)
            self.k.copy_(keys)
            self.v.copy_(values)
        elif self.write == "twice":
            self.k[:, :, at] = k
            self.k[:, :, at + 1] = k
            self.v[:, :, at] = v
        elif self.write == "apart":
            self.k[:, :, at] = k
            self.v[:, :, at + 1] = v
        elif self.write == "also read":
            self.k[:, :, at] = k
            self.v[:, :, at] = v
            q = q + self.k.mean()
        if self.read == "interleave":
            keys, values = (y.repeat_interleave(HEADS // KV, 1) for y in (keys, values))
        elif self.read == "expand":
            keys, values = (
                y[:, :, None].expand(-1, -1, HEADS // KV, -1, -1).reshape(B, HEADS, S, HD)
                for y in (keys, values)
            )
        y = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=self.read == "gqa"
        )
        return self.out(y.transpose(1, 2).reshape(B, t, HEADS * HD))


class Net(nn.Module):
    """Two layers under one mask, as `mask` says."""

    def __init__(self, write: str = "put", read: str = "gqa", mask: str = "prefix", **kwargs: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(write, read, **kwargs) for _ in range(2))
        self.mask = mask

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        counted, mask, causal = torch.arange(S, device=x.device), None, self.mask == "causal"
        if self.mask == "prefix":
            mask = (counted[None, :] <= at[:, None])[None, None]
        elif self.mask == "greater":
            mask = (at[None, None, :, None] + 1) > counted.view(1, 1, 1, S)
        elif self.mask == "window":
            mask = (counted[None, :] <= at[:, None]) & (counted[None, :] > at[:, None] - 5)
        elif self.mask == "added":
            mask = torch.where(counted[None, :] <= at[:, None], 0.0, float("-inf"))[None].to(x.dtype)
        for layer in self.layers:
            x = x + layer(x, at, mask, causal)
        return x


def inputs(at: list[int]) -> tuple[Tensor, Tensor]:
    return torch.randn(B, len(at), 64).bfloat16(), torch.tensor(at)


def quantized(net: nn.Module, recipe: Any = "kv_int8", count: int = 1) -> Any:
    with torch.no_grad():
        return bf.quantize(
            net, recipe, scope="program", example_inputs=inputs([3, 4, 5][:count]), target="cpu"
        )


def compare(net: nn.Module, program: Any, steps: list[list[int]], tolerance: float = 0.01) -> None:
    """The program's outputs follow the model's, step by step."""
    with torch.no_grad():
        for at in steps:
            given = inputs(at)
            want, got = net(*given), program(*given)
            error = (got - want).float().norm() / want.float().norm()
            assert 0 < error < tolerance, f"{at}: {error:.2g}"


# --- what is found ---------------------------------------------------------------------------------------

GRAPH = """\
k_codes, k_scales, v_codes, v_scales
linear(x, qkv_weight)
split_with_sizes(linear, [256, 128, 128], -1)
view(getitem, [2, 1, -1, 64])
transpose(view, 1, 2)
view(getitem_1, [2, 1, -1, 64])
transpose(view_1, 1, 2)
view(getitem_2, [2, 1, -1, 64])
transpose(view_2, 1, 2)
unsqueeze(at, 0)
cache_write([k_codes, k_scales, v_codes, v_scales], transpose_1, transpose_2, unsqueeze, None, SPEC)
arange(24, 25)
unsqueeze(arange, 0)
attend(transpose, [k_codes, k_scales, v_codes, v_scales], unsqueeze_1, None, None, SPEC)
transpose(attend, 1, 2)
reshape(transpose_3, [2, 1, 256])
linear(reshape, out_weight)
"""


def test_the_graph_is_a_write_and_an_attention() -> None:
    gm = bf.capture(Attention(), inputs([3]))
    assert Pipeline([QuantizeCache(recipe="kv_int8")]).run(gm).steps[-1].rewrites == 1
    spec = "attention 4/2x64 bf16 int8[bf16,halves64] int8[bf16,halves64]"
    lines = [", ".join(n.name for n in gm.graph.find_nodes(op="get_attr") if "weight" not in n.name)]
    for node in gm.graph.nodes:
        if node.op == "call_function" and "getitem" not in node.name:
            args = ", ".join(map(str, node.args)).replace(spec, "SPEC")
            lines.append(f"{node.target._schema.name.split('::')[1]}({args})")
    assert "\n".join(lines) + "\n" == GRAPH
    assert {name for name, _ in gm.named_buffers()} == {"k_codes", "k_scales", "v_codes", "v_scales"}


@pytest.mark.parametrize("write", ["put", "index_copy", "slice", "functional", "scatter"])
def test_ways_to_write(write: str) -> None:
    net = Net(write).eval()
    program = quantized(copy.deepcopy(net))
    assert not any("sdpa" in str(n.target) or "attention" in str(n.target) for n in program.graph.nodes)
    compare(net, program, [[3], [7], [8]])


@pytest.mark.parametrize("read", ["interleave", "expand"])
def test_repeated_heads(read: str) -> None:
    net = Net(read=read).eval()
    compare(net, quantized(copy.deepcopy(net)), [[0], [5]])


@pytest.mark.parametrize(
    ("mask", "kind"),
    [("prefix", ""), ("greater", ""), ("window", " mask:bool"), ("added", " mask:float"), ("", "")],
)
def test_masks(mask: str, kind: str) -> None:
    """Several queries at once; what has the shape of a prefix leaves no mask to be read."""
    net = Net(mask=mask).eval()
    program = quantized(copy.deepcopy(net), count=3)
    texts = [n.args[-1] for n in program.graph.nodes if n.target is torch.ops.bitfold.attend.default]
    assert len(texts) == 2 and all(str(text).endswith(f"halves64]{kind}") for text in texts)
    compare(net, program, [[0, 1, 2], [5, 6, 7], [21, 22, 23]])


def test_a_mask_is_looked_at_once_for_all_layers() -> None:
    for mask, target in (("prefix", torch.ops.aten.add.Tensor), ("window", torch.ops.aten.amax.default)):
        gm = bf.capture(Net(mask=mask), inputs([3]))
        before = len(gm.graph.find_nodes(op="call_function", target=target))
        Pipeline([QuantizeCache()]).run(gm)
        assert len(gm.graph.find_nodes(op="call_function", target=target)) == before + 1


def test_causal_from_the_first_token() -> None:
    net = Net("slice", mask="causal").eval()
    compare(net, quantized(copy.deepcopy(net), count=3), [[0, 1, 2]])


# --- what a user sees ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (Net("twice"), r"layers.0.k is not written once, at positions along its third dimension"),
        (Net("apart"), "keys and values are written at positions of their own"),
        (Net("also read"), "layers.0.k is read by more than one attention, or by something else"),
        (Net("none"), "found nothing to quantize"),
    ],
    ids=["twice", "apart", "also read", "no write"],
)
def test_what_cannot_be_in_codes_is_said(net: Net, match: str) -> None:
    with pytest.raises(bf.BitfoldError, match=match):
        quantized(net.eval())
    rule = bf.Rule(op="cache", weight="int8[bf16]", on_misfit="report")
    gm = bf.capture(net, inputs([3]))
    assert QuantizeCache(recipe=str(bf.Recipe("soft", (rule,)))).apply(gm) == 0
    assert net.mask == "prefix" and (not state(gm).misses) == ("nothing" in match)


def test_formats_that_a_cache_cannot_take() -> None:
    for text, match in (
        ("int8[tensor]", "one scale for all tokens, which data would have to tell"),
        ("int3[bf16]", "keys of 64 numbers cannot be cached as int3"),
        ("nvfp4", "scales of a cache are f32"),
    ):
        with pytest.raises(bf.BitfoldError, match=match):
            quantized(Net().eval(), bf.Recipe("odd", (bf.Rule(op="cache", weight=text),)))
    with pytest.raises(
        bf.BitfoldError, match=r"in main memory float32 too, and this attention is in torch.float64"
    ):
        bf.quantize(
            Net(dtype=torch.float64).eval(), "kv_int8", scope="program",
            example_inputs=(torch.randn(B, 1, 64).double(), torch.tensor([3])), target="cpu",
        )  # fmt: skip
    with pytest.raises(bf.BitfoldError, match="is about a cache; give its format as the weight"):
        bf.Rule(op="cache", weight="int8", input="int8")


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
