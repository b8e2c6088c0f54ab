"""The pass quantize_cache: which buffers become codes, what the graph is then, and what is left and why."""

from __future__ import annotations

import copy

import pytest
import torch
from cache_cases import Attention, B, Net, compare, inputs, quantized

import bitfold as bf
from bitfold.lowering.kv_cache.quantize import QuantizeCache
from bitfold.passes import Pipeline, state

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
