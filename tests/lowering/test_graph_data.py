"""Graphs as data: exactly what is written, and that what comes back is the same graph, sizes included."""

import json
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import bitfold as bf
from bitfold.lowering.files.graph_data import dump, load, tensor_names
from bitfold.lowering.files.graph_values import GraphDataError, decode, encode, target_name, target_of
from bitfold.lowering.retype import retyped
from bitfold.passes import Stage, snapshot, state, verify


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


def folded(model: nn.Module, inputs: tuple[Any, ...], dynamic: Any = "batch") -> GraphModule:
    gm = bf.capture(model, inputs, dynamic=dynamic)
    bf.Pipeline.parse("annotate{recipe=int8},fold").run(gm)
    return gm


def tensors_of(gm: GraphModule) -> dict[str, Tensor]:
    held = dict(gm.named_parameters()) | dict(gm.named_buffers())
    return {name: held[name] for name in tensor_names(dump(gm))}


def test_the_data_of_a_small_graph() -> None:
    data = dump(folded(Tiny(), (torch.randn(3, 4),)))
    nodes = data.pop("nodes")
    assert data == {
        "signature": {"args": ["x"], "in": ["tuple", [["tuple", ["*"]], ["dict", [], []]]], "out": "*"},
        "symbols": {"s0": {"hint": 3, "min": data["symbols"]["s0"]["min"], "max": None}},
        "scope": "program",
    }
    assert [(n["op"], n["target"] if n["op"] != "output" else "", n.get("args")) for n in nodes] == [
        ("get_attr", "fc.bias", None),
        ("placeholder", "x", None),
        ("get_attr", "fc_weight_codes", None),
        ("get_attr", "fc_weight_scales", None),
        (
            "call_function",
            "bitfold.dequantize.default",
            [[{"node": "fc_weight_codes"}, {"node": "fc_weight_scales"}], "int8", 4, {"dtype": "float32"}],
        ),
        (
            "call_function",
            "aten.linear.default",
            [{"node": "x"}, {"node": nodes[4]["name"]}, {"node": "fc_bias"}],
        ),
        ("call_function", "aten.relu.default", [{"node": "linear"}]),
        ("output", "", [{"tuple": [{"node": "relu"}]}]),
    ]
    assert nodes[1]["val"] == {"dtype": "float32", "shape": ["s0", 4], "device": "cpu"}
    assert nodes[5]["module"] == "fc" and ".py" not in json.dumps(nodes)


class Sizes(nn.Module):
    """Arithmetic on sizes, two batches that are not the same size, constants of several kinds."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = x.reshape(x.shape[0] * 2, -1).to(torch.float64).clamp(min=float("-inf"))
        return z[:, ::2], {"y": y.expand(y.shape[0], 3), "m": torch.full((x.shape[0],), 1.5)}


def test_sizes_come_back_as_they_were() -> None:
    gm = bf.capture(Sizes(), (torch.randn(3, 8), torch.randn(5, 1)), dynamic="batch")
    state(gm).stage = Stage.folded
    data = json.loads(json.dumps(dump(gm)))
    again = load(data, {})
    verify(again, Stage.folded)
    inputs = [node.meta["val"].shape for node in again.graph.find_nodes(op="placeholder")]
    assert isinstance(inputs[0][0], torch.SymInt) and str(inputs[0][0]) != str(inputs[1][0])
    assert dump(again) == data
    for batch in (2, 7):
        given = torch.randn(batch, 8), torch.randn(4, 1)
        ours, theirs = again(*given), gm(*given)
        assert torch.equal(ours[0], theirs[0]) and all(
            torch.equal(ours[1][k], theirs[1][k]) for k in theirs[1]
        )
    old, new = ([(n.name, n.target, n.args) for n in snapshot(g)] for g in (gm, again))
    assert old == new


def test_passes_go_on_from_a_loaded_graph() -> None:
    gm = folded(Tiny(), (torch.randn(3, 4),))
    again = load(dump(gm), tensors_of(gm))
    bf.Pipeline.parse("fuse,lower{target=cpu}").run(again)
    x = torch.randn(5, 4)
    torch.testing.assert_close(again(x), gm(x))


def test_retyped_changes_inputs_and_decoded_weights() -> None:
    gm = folded(Tiny(), (torch.randn(3, 4),))
    data = retyped(dump(gm), torch.float32, torch.bfloat16)
    tensors = {name: t.bfloat16() if name == "fc.bias" else t for name, t in tensors_of(gm).items()}
    assert load(data, tensors)(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16


VALUES: list[Any] = [
    *(
        None,
        True,
        3,
        -1.5,
        float("inf"),
        "text",
        (1, [2, (3,)]),
        {"a": 1, 2: "b"},
        slice(None, 3, None),
        1 + 2j,
    ),
    *(torch.float8_e4m3fn, torch.device("cpu"), torch.contiguous_format, torch.strided),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_round_trip(value: Any) -> None:
    data = json.loads(json.dumps(encode(value, str)))
    assert decode(data, {}) == value and type(decode(data, {})) is type(value)


@pytest.mark.parametrize(
    "target",
    [
        torch.ops.aten.add.Tensor,
        torch.ops.bitfold.quantize.default,
        operator.getitem,
        torch.sym_max,
        torch.ops.prims.iota.default,
    ],
    ids=lambda target: target.__name__,
)
def test_operators_round_trip(target: Any) -> None:
    assert target_of(target_name(target)) is target


REFUSED = [
    *("os.system", "operator.methodcaller", "operator.attrgetter", "aten.from_file.default", "torch.load"),
    *("builtins.eval.default", "aten.add", "torch.ops.aten.add.Tensor", "aten.__class__.x", 7, None),
]


@pytest.mark.parametrize("name", REFUSED, ids=repr)
def test_what_is_no_operator_is_refused(name: object) -> None:
    with pytest.raises(GraphDataError):
        target_of(name)


def test_names_cannot_carry_code() -> None:
    data = dump(folded(Tiny(), (torch.randn(3, 4),)))
    for place, text in (("name", "x = 1 #"), ("target", "x: print(1)"), ("target", 'a".b')):
        bad = json.loads(json.dumps(data))
        bad["nodes"][1][place] = text
        with pytest.raises(GraphDataError, match="cannot be trusted"):
            load(bad, {name: torch.zeros(1) for name in tensor_names(data)})
    bad = json.loads(json.dumps(data))
    bad["signature"]["args"] = ["x=exit()"]
    with pytest.raises(GraphDataError, match="cannot be trusted"):
        load(bad, {name: torch.zeros(1) for name in tensor_names(data)})


def test_foreign_operators_and_modules_are_not_written() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(print, (x,)))
    with pytest.raises(GraphDataError, match="node 'print_1'"):
        dump(GraphModule(nn.Module(), graph))
    with pytest.raises(GraphDataError, match="calls a Linear"):
        root = nn.Sequential(nn.Linear(2, 2))
        graph = Graph()
        graph.output(graph.call_module("0", (graph.placeholder("x"),)))
        dump(GraphModule(root, graph))


def test_a_missing_tensor_is_named() -> None:
    data = dump(folded(Tiny(), (torch.randn(3, 4),)))
    with pytest.raises(GraphDataError, match=r"wants a tensor 'fc\.bias'"):
        load(data, {})
