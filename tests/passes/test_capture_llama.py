"""A Hugging Face Llama, small: program scope with open sizes, frame scope through a decoding loop."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from bitfold.passes import Pipeline, capture, capture_frame, constant, origin, source_parameter, state

transformers = pytest.importorskip("transformers")
aten = torch.ops.aten


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=72,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=256,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length))


def linear_paths(gm: GraphModule) -> list[str]:
    found = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    return [parameter[0] for node in found if (parameter := source_parameter(gm, node.args[1]))]


LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
LAYERS = [f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in LAYER]


@pytest.mark.parametrize("example", [(2, 7), (1, 1)])
def test_program_scope_with_open_batch_and_sequence(llama: nn.Module, example: tuple[int, int]) -> None:
    inputs = {"input_ids": tokens(*example)}
    gm = capture(llama, inputs, kwargs={"use_cache": False}, dynamic="batch+sequence")
    assert state(gm).misses == []
    called = Counter(node.target for node in gm.graph.nodes if node.op == "call_function")
    assert called[aten.linear.default] == 15
    assert called[aten.scaled_dot_product_attention.default] == 2
    assert not any(node.op == "call_module" for node in gm.graph.nodes)
    assert linear_paths(gm)[:-1] == LAYERS
    attention = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)[1]
    assert origin(attention).module_path == "model.layers.1.self_attn"
    Pipeline.parse("normalize,fold_constants,eliminate_dead").run(gm)
    with torch.inference_mode():
        for batch, length in ((2, 7), (3, 11), (1, 1), (1, 20)):
            ids = tokens(batch, length)
            assert torch.equal(gm(input_ids=ids, use_cache=False).logits, llama(ids, use_cache=False).logits)


def test_the_tied_head_is_the_embedding(llama: nn.Module) -> None:
    gm = capture(llama, {"input_ids": tokens(2, 7)}, kwargs={"use_cache": False}, dynamic="batch+sequence")
    (table,) = gm.graph.find_nodes(op="call_function", target=aten.embedding.default)
    head = gm.graph.find_nodes(op="call_function", target=aten.linear.default)[-1]
    assert [origin(node).module_path for node in (table, head)] == ["model.embed_tokens", "lm_head"]
    weights = [source_parameter(gm, node) for node in (table.args[0], head.args[1])]
    assert weights[0] is not None and weights[1] is not None
    assert weights[0][1] is weights[1][1]


def test_frame_scope_through_a_decoding_loop(llama: nn.Module) -> None:
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        graphs.append(capture_frame(gm, inputs))
        return graphs[-1].forward

    cache = transformers.StaticCache(llama.config, max_cache_len=64)
    compiled = torch.compile(llama, backend=backend, fullgraph=True)
    with torch.inference_mode():
        ids = tokens(1, 7)
        out = compiled(ids, past_key_values=cache, use_cache=True)
        for _ in range(40):
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
            out = compiled(ids[:, -1:], past_key_values=cache, use_cache=True)
        expected = llama(ids).logits[:, -1]
    # K and V come from the cache in another order of additions than in one go over all tokens.
    torch.testing.assert_close(out.logits[:, -1], expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2  # prefill and decode
    for gm in graphs:
        assert linear_paths(gm) == [*LAYERS, "model.embed_tokens.weight"]
        weight = gm.graph.find_nodes(op="call_function", target=aten.linear.default)[0].args[1]
        value = constant(gm, weight)
        assert value is not None
        assert value.data_ptr() == llama.model.layers[0].self_attn.q_proj.weight.data_ptr()
        written = gm.graph.find_nodes(op="call_function", target=aten.index_copy_.default)
        assert len(written) == 4


def test_frame_scope_keeps_batch_and_sequence_open(llama: nn.Module) -> None:
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        graphs.append(capture_frame(gm, inputs))
        return graphs[-1].forward

    compiled = torch.compile(llama, backend=backend, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for batch, length in ((2, 7), (3, 11), (5, 20), (4, 33)):
            ids = tokens(batch, length)
            ours = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(ours, llama(ids, use_cache=False).logits)
    assert len(graphs) == 1
