"""The verifier: each promise of a stage, broken once."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

from bitfold.passes import Pipeline, Stage, VerificationError, capture, verify

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x))


def captured() -> GraphModule:
    return capture(Net(), torch.zeros(2, 4))


def node(gm: GraphModule, name: str) -> Node:
    return next(node for node in gm.graph.nodes if node.name == name)


def before_output(gm: GraphModule, **how: object) -> Node:
    with gm.graph.inserting_before(gm.graph.output_node()):
        new = gm.graph.create_node(
            how["op"], how["target"], how.get("args", (node(gm, "relu"),)), {}, name="new"
        )
    new.meta["val"] = node(gm, "relu").meta["val"]
    new.meta["bitfold_from"] = ("relu",)
    return new


class Watch(nn.Module):
    is_observer = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def no_value(gm: GraphModule) -> None:
    del node(gm, "relu").meta["val"]


def no_origin(gm: GraphModule) -> None:
    fresh = before_output(gm, op="call_function", target=aten.relu.default)
    fresh.meta.pop("bitfold_from")


def real_value(gm: GraphModule) -> None:
    node(gm, "relu").meta["val"] = torch.zeros(2, 3)


def python_function(gm: GraphModule) -> None:
    before_output(gm, op="call_function", target=torch.relu)


def method(gm: GraphModule) -> None:
    before_output(gm, op="call_method", target="relu")


def later_use(gm: GraphModule) -> None:
    node(gm, "linear").prepend(node(gm, "relu"))


def no_attribute(gm: GraphModule) -> None:
    del gm.fc.weight


def other_shape(gm: GraphModule) -> None:
    gm.fc.weight = nn.Parameter(torch.zeros(5, 4))


def no_output(gm: GraphModule) -> None:
    gm.graph.erase_node(gm.graph.output_node())


def observer(gm: GraphModule) -> None:
    gm.add_module("watch", Watch())
    before_output(gm, op="call_module", target="watch")


def region(gm: GraphModule) -> None:
    gm.add_module("region", captured())
    before_output(gm, op="call_module", target="region")


def plain_module(gm: GraphModule) -> None:
    gm.add_module("act", nn.ReLU())
    before_output(gm, op="call_module", target="act")


def no_module(gm: GraphModule) -> None:
    before_output(gm, op="call_module", target="absent")


def dequantize(gm: GraphModule) -> None:
    before_output(gm, op="call_function", target=torch.ops.bitfold.dequantize.default)


def fake_quantize(gm: GraphModule) -> None:
    before_output(gm, op="call_function", target=torch.ops.bitfold.fake_quantize.default)


BROKEN: list[tuple[Callable[[GraphModule], None], Stage, str]] = [
    (no_value, Stage.captured, "node 'relu' .* no meta\\['val'\\]"),
    (no_origin, Stage.captured, "node 'new': it has no provenance"),
    (real_value, Stage.captured, "node 'relu' .* holds a real tensor"),
    (python_function, Stage.captured, "the Python function .* is not an operator"),
    (method, Stage.captured, "a call_method is not legal"),
    (later_use, Stage.captured, "node 'relu' .* uses 'linear', which comes later"),
    (no_attribute, Stage.captured, "the graph has no attribute 'fc.weight'"),
    (other_shape, Stage.captured, r"says float32\[3, 4\] but the constant 'fc.weight' is float32\[5, 4\]"),
    (no_output, Stage.captured, "the graph has no output"),
    (observer, Stage.annotated, "a called module is left"),
    (region, Stage.observed, "neither an observer nor flattened: .* 'region'"),
    (dequantize, Stage.observed, "a folded operator stands in a graph that is not folded"),
    (observer, Stage.fake_quantized, "an observer or another called module is left"),
    (observer, Stage.folded, "an observer or another called module is left"),
    (fake_quantize, Stage.folded, "a fake-quantize node is left"),
    (plain_module, Stage.fused, "not an outlined region .* ReLU 'act'"),
    (observer, Stage.lowered, "an observer is left in a lowered graph"),
    (no_module, Stage.lowered, "the graph has no module 'absent'"),
]

KEPT: list[tuple[Callable[[GraphModule], None], Stage]] = [
    (observer, Stage.observed),
    (fake_quantize, Stage.fake_quantized),
    (fake_quantize, Stage.captured),
    (dequantize, Stage.folded),
    (region, Stage.fused),
    (plain_module, Stage.lowered),
]


@pytest.mark.parametrize(("breaks", "stage", "says"), BROKEN)
def test_broken(breaks: Callable[[GraphModule], None], stage: Stage, says: str) -> None:
    gm = captured()
    breaks(gm)
    with pytest.raises(VerificationError, match=says):
        verify(gm, stage)


def folded() -> GraphModule:
    gm = captured()
    Pipeline.parse("annotate{recipe=int8},fold").run(gm)
    return gm


def test_an_annotated_weight_has_to_be_gone_once_folded() -> None:
    gm = folded()
    linear, bias = node(gm, "linear"), node(gm, "fc_bias")
    linear.update_arg(1, bias)
    with pytest.raises(VerificationError, match=r"was to become int8, but it still reads 'fc.bias'"):
        verify(gm, Stage.folded)


def test_a_dequantize_has_all_its_parts() -> None:
    gm = folded()
    (dequantize,) = gm.graph.find_nodes(op="call_function", target=torch.ops.bitfold.dequantize.default)
    dequantize.update_arg(0, dequantize.args[0][:1])
    with pytest.raises(VerificationError, match="int8 has the parts codes, scales, and it was given 1"):
        verify(gm, Stage.folded)


@pytest.mark.parametrize(("edit", "stage"), KEPT)
def test_legal(edit: Callable[[GraphModule], None], stage: Stage) -> None:
    gm = captured()
    edit(gm)
    verify(gm, stage)


def test_the_line_of_the_model_is_named() -> None:
    gm = captured()
    no_value(gm)
    with pytest.raises(
        VerificationError, match=r"^after my_pass: node 'relu' \(test_stages_verify\.py:\d+\)"
    ):
        verify(gm, Stage.captured, after="my_pass")


def test_stages_are_ordered() -> None:
    assert sorted(Stage, key=lambda stage: stage.value) == list(Stage)
    assert Stage.captured < Stage.fused <= Stage.fused and Stage.lowered > Stage.folded >= Stage.annotated


def seconds_for(users: int) -> float:
    """Time to verify a graph in which one constant has this many users."""
    gm = captured()
    weight, last = node(gm, "fc_bias"), node(gm, "relu")
    with gm.graph.inserting_before(gm.graph.output_node()):
        for _ in range(users):
            new = gm.graph.call_function(aten.add.Tensor, (last, weight))
            new.meta = dict(last.meta)
            last = new
    started = time.perf_counter()
    verify(gm, Stage.captured)
    return time.perf_counter() - started


@pytest.mark.slow
def test_a_constant_with_many_users_costs_linear_time() -> None:
    # 8 times the users: a quadratic walk would take 64 times as long.
    assert seconds_for(16000) < 24 * seconds_for(2000) + 0.05
