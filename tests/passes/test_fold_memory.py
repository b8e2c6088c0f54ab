"""Fold as work on a model: weights given back one by one, codes that were given, a failure midway, time."""

import gc
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from fold_cases import folded
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import bitfold.passes.fold as fold_module
from bitfold.formats import BitfoldError, format
from bitfold.passes import (
    Pipeline,
    add_constant,
    call,
    capture,
    fake_mode,
    state,
)
from bitfold.passes.stages import Stage


def test_float_weights_are_dropped_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is quantized, the float weights before it are gone already."""
    gm = capture(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))), (torch.zeros(1, 8),))
    weights = [weakref.ref(parameter) for parameter in gm.parameters()]
    alive = []
    original = fold_module._Folder.codes

    def codes(self, *args):
        gc.collect()
        alive.append([weight() is not None for weight in weights])
        return original(self, *args)

    monkeypatch.setattr(fold_module._Folder, "codes", codes)
    Pipeline.parse("annotate{recipe=int8},fold").run(gm)
    assert alive == [[i >= done for i in range(4)] for done in range(4)]


def test_a_weight_that_something_else_reads_stays() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) / self.fc.weight.norm()

    gm = folded(Norm(), torch.zeros(2, 8), "int8")
    assert [name for name, _ in gm.named_parameters()] == ["fc.weight"]


def test_codes_of_a_checkpoint_are_taken_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(32, 8, bias=False))
    gm = capture(model, (torch.zeros(2, 32),))
    given = format("q4_1").quantize(torch.randn(8, 32))
    state(gm).stored = {"0.weight": given}
    Pipeline.parse("annotate{recipe=stored},fold").run(gm)
    held = dict(gm.named_buffers())
    assert list(held) == ["_0_weight_codes", "_0_weight_scales", "_0_weight_zeros"]
    assert all(ours is theirs for ours, theirs in zip(held.values(), given.parts, strict=True))
    x = torch.randn(2, 32)
    assert torch.equal(gm(x), F.linear(x, given.dequantize()))


def test_a_failure_midway_says_how_far_it_came_and_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    expected = folded(model, x, "int8_dynamic")(x)
    gm = capture(model, (x,))
    Pipeline.parse("annotate{recipe=int8_dynamic}").run(gm)
    original = fold_module._Folder.codes

    def codes(self, on, *args):
        if on.layer == "1":
            raise MemoryError("no room")
        return original(self, on, *args)

    with monkeypatch.context() as patched:
        patched.setattr(fold_module._Folder, "codes", codes)
        with pytest.raises(BitfoldError) as caught:
            Pipeline.parse("fold").run(gm)
    assert str(caught.value) == (
        "folding stopped at the weight of layer 1 after 3 of 6 edges: no room; what is before it holds "
        "codes, the rest is float and whole, and running fold again "
        "goes on from there"
    )
    Pipeline.parse("fold").run(gm)
    assert state(gm).stage is Stage.folded
    assert torch.equal(gm(x), expected)


def stack(layers: int) -> GraphModule:
    """linear, relu, linear, relu, ..., built node by node: capturing thousands of them takes minutes."""
    gm = GraphModule(nn.Module(), Graph())
    mode = fake_mode(gm)
    x = gm.graph.placeholder("x")
    x.meta["val"] = mode.from_tensor(torch.zeros(2, 8), static_shapes=True)
    out = gm.graph.output((x,))
    for i in range(layers):
        weight = add_constant(gm, f"w{i}", nn.Parameter(torch.randn(8, 8)), like=out)
        x = call(gm, torch.ops.aten.linear.default, (x, weight), before=out, origin_from=weight)
        x = call(gm, torch.ops.aten.relu.default, (x,), before=out, origin_from=weight)
    out.args = ((x,),)
    return gm


def test_the_passes_take_time_linear_in_the_nodes() -> None:
    def seconds(layers: int) -> float:
        gm = stack(layers)
        started = time.process_time()
        for step in Pipeline.parse("annotate{recipe=int8_dynamic},fold,fuse").passes:
            step.apply(gm)
            state(gm).stage = step.produces
        return time.process_time() - started

    seconds(10)
    # Eight times the nodes: work that is quadratic in them would take 64 times as long.
    assert seconds(400) < 24 * seconds(50)
