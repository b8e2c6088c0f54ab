"""State, Miss and provenance: what passes share."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from bitfold.passes import Miss, Stage, State, capture, origin, report, state
from bitfold.passes.provenance import inherit, module_path, source_line


def captured() -> GraphModule:
    return capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(2, 4))


def test_a_miss_is_false_and_keeps_its_reason() -> None:
    assert not Miss("its weight is not constant")
    assert Miss("a").reason == "a"


def test_a_deep_copied_graph_has_a_state_of_its_own() -> None:
    gm = captured()
    twin = copy.deepcopy(gm)
    state(twin).stage = Stage.folded
    report(twin, next(iter(twin.graph.nodes)), Miss("only here"))
    assert state(gm).stage is Stage.captured
    assert state(gm).misses == []
    assert [miss.reason for miss in state(twin).misses] == ["only here"]


def test_a_graph_with_shared_meta_gets_its_own_state_too() -> None:
    gm = captured()
    twin = GraphModule(gm, copy.deepcopy(gm.graph))
    twin.meta = dict(gm.meta)
    assert state(twin) is not state(gm)
    assert state(twin).fake_mode is state(gm).fake_mode


def test_deepcopy_of_a_state_shares_the_users_tensors() -> None:
    weight = nn.Parameter(torch.zeros(3))
    twin = copy.deepcopy(State("frame", params={"w": weight}))
    assert twin.params["w"] is weight


def test_state_survives_pickle_without_tensors() -> None:
    before = State("frame", Stage.folded, params={"w": torch.zeros(3)}, path_prefix="a.b")
    after = pickle.loads(pickle.dumps(before))
    assert (after.scope, after.stage, after.path_prefix, after.params) == ("frame", Stage.folded, "a.b", {})


def test_report_says_layer_line_and_reason_in_the_model_s_own_paths() -> None:
    gm = captured()
    state(gm).path_prefix = "block.1"
    node = next(node for node in gm.graph.nodes if "linear" in node.name)
    report(gm, node, Miss("K is 4, and a group of 3 does not divide it"), asked="int4[g3]")
    text = str(state(gm).misses[0])
    assert text.startswith("block.1.0 (")
    assert text.endswith("int4[g3]: K is 4, and a group of 3 does not divide it")


@pytest.mark.parametrize(
    ("spelled", "path"),
    [
        ("", ""),
        ("layers.0.fc", "layers.0.fc"),
        ("L['self']._modules['layers']._modules['0'].fc", "layers.0.fc"),
        ("L['model'].model.layers.slice(None, 30, None)._modules['12'].mlp", "model.layers.12.mlp"),
        ("L['self'].layers[3].mlp", "layers.3.mlp"),
        ("L['self']", ""),
        ("L__self__", ""),
        ("G['net'].head", "head"),
        ("getattr(L['self'].blocks, 'a b').fc", "blocks.a b.fc"),
        ("_empty_nn_module_stack_from_metadata_hook", ""),
    ],
)
def test_module_paths_from_torch_s_spellings(spelled: str, path: str) -> None:
    assert module_path(spelled) == path


def test_the_line_is_the_user_s_not_torch_s() -> None:
    trace = (
        'File "/home/u/model.py", line 9, in forward\n    h = self.fc(x)\n'
        'File "/v/torch/nn/linear.py", line 134, in forward\n    return F.linear(input)\n'
    )
    assert source_line(trace) == ("/home/u/model.py", 9, "h = self.fc(x)")
    assert source_line("") == ("", 0, "")


def test_only_wrappers_is_better_than_nothing() -> None:
    trace = 'File "/v/torch/nn/linear.py", line 134, in forward\n    return F.linear(input)\n'
    assert source_line(trace)[1] == 134


def test_inherit_names_the_first_nodes_of_a_chain_of_rewrites() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    old = graph.call_function(torch.relu, (x,))
    old.meta["stack_trace"] = 'File "m.py", line 3, in forward\n    relu\n'
    new = inherit(graph.call_function(torch.relu, (x,)), [old])
    newest = inherit(graph.call_function(torch.relu, (x,)), [new, x])
    assert newest.meta["bitfold_from"] == ("relu", "x")
    assert origin(newest).where == "m.py:3"
