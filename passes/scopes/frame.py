"""Frame scope: the graph that Dynamo hands to a `torch.compile` backend, as pre-dispatch ATen.

Comes in: Dynamo's graph of Python functions, and the real tensors it will be called with. Goes out: a graph
of operators with the same placeholders in the same order, whose `State.params` says which placeholders are
the user's parameters and what they hold.

    l_x_, l_self_fc_weight : F.linear(l_x_, l_self_fc_weight)
    ->  aten.linear.default(l_x_, l_self_fc_weight), params = {'l_self_fc_weight': Parameter}

The sizes stay symbolic: the retracing runs on Dynamo's own fake values and adds no guard.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.traceback import preserve_node_meta

from ..core import State, state
from ..normalize import Normalize
from ..provenance import has_provenance, inherit, module_path
from ..verify import verify

_HELD = re.compile(r"\._(?:parameters|buffers)\['([^']*)'\]$")
_ATTRIBUTE = re.compile(r"\.([A-Za-z_]\w*)$")


def is_training_graph(inputs: Sequence[Any]) -> bool:
    """Whether gradients will be asked for: grad mode is on and a floating input requires grad."""
    return torch.is_grad_enabled() and any(
        isinstance(given, Tensor) and given.is_floating_point() and given.requires_grad for given in inputs
    )


def capture_frame(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Dynamo's graph as a normalized graph at stage `captured`, same placeholders, same order.

    `example_inputs` are what the backend was given: real parameters and buffers, real or fake inputs,
    SymInts.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [
        node.meta.get("example_value", given)
        for node, given in zip(placeholders, example_inputs, strict=True)
    ]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    mode = mode or FakeTensorMode(shape_env=ShapeEnv())
    values = [mode.from_tensor(value) if _is_real(value) else value for value in values]
    traced = retrace(gm, values, mode)
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for new, old in zip(inputs, placeholders, strict=True):
        _rename(new, old)
    for node in traced.graph.nodes:
        # A graph that was not made by Dynamo may say nothing of its nodes: they come from themselves then.
        if node.op == "call_function" and not has_provenance(node):
            inherit(node, [node])
    params, paths = _parameters(placeholders, inputs, example_inputs)
    traced.meta["bitfold"] = State("frame", params=params, param_paths=paths)
    state(traced).fake_mode = mode
    Normalize().apply(traced)
    traced.recompile()
    verify(traced, state(traced).stage, after="capture")
    return traced


def retrace(gm: GraphModule, values: Sequence[Any], mode: FakeTensorMode) -> GraphModule:
    """`gm` run on fake `values`, recorded as pre-dispatch ATen; its own tensors become `get_attr` again.

    What stands within `torch.vmap` or `torch.func.grad` is recorded as what these make of it: before dispatch
    the tracer sees their wrappers of tensors, which it does not know, and takes for constants.
    """
    held = _held_tensors(gm)
    fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in held.values()]

    def run(*given: Any) -> Any:
        inputs, attributes = given[: len(values)], dict(zip(held, given[len(values) :], strict=True))
        return _WithAttributes(gm, attributes).run(*inputs)

    # Tensors made in the frame (torch.ones(3)) must be fake too, hence the mode around it all.
    with preserve_node_meta(), mode, _quiet_guards(mode):
        traced = make_fx(
            run, pre_dispatch=not _transforms(gm), tracing_mode="real", record_module_stack=True
        )(*values, *fakes)
    _as_attributes(traced, list(held.items()), len(values))
    return traced


_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_SUBGRAPH = torch.ops.higher_order.invoke_subgraph


class _WithAttributes(Interpreter):
    """Runs a graph with the tensors it holds passed in, so that the tracer sees them as inputs.

    Blocks that only mark what they hold are run in line: a subgraph that is compiled once, and, where no
    gradient is asked for, a checkpoint.
    """

    def __init__(self, gm: GraphModule, attributes: dict[str, Any]) -> None:
        super().__init__(gm)
        self.attributes = attributes

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.attributes:
            return self.attributes[target]
        return super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is _SUBGRAPH:
            return Interpreter(args[0]).run(*args[2:])
        if target is _CHECKPOINT and not torch.is_grad_enabled():
            return Interpreter(args[0]).run(*args[1:])
        return super().call_function(target, args, kwargs)


def _transforms(gm: GraphModule) -> bool:
    """Whether functions are transformed (`torch.vmap`, `torch.func`) in the graph or in one that it holds."""
    return any(
        str(getattr(node.target, "__module__", "")).startswith(("torch._functorch.", "torch._C._functorch"))
        for graph in gm.modules()
        if isinstance(graph, GraphModule)
        for node in graph.graph.nodes
        if node.op == "call_function"
    )


def _held_tensors(gm: GraphModule) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr" or node.target in held:
            continue
        value: Any = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor):
            held[str(node.target)] = value
    return held


def _as_attributes(traced: GraphModule, held: list[tuple[str, Tensor]], first: int) -> None:
    """Turn the placeholders after the first `first` ones into attributes holding these tensors."""
    extra = [node for node in traced.graph.nodes if node.op == "placeholder"][first:]
    for node, (path, tensor) in zip(extra, held, strict=True):
        name = _register(traced, path, tensor)
        with traced.graph.inserting_before(node):
            attribute = traced.graph.create_node("get_attr", name, (), {}, name=name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        traced.graph.erase_node(node)


def _register(traced: GraphModule, path: str, tensor: Tensor) -> str:
    name = path.replace(".", "_")
    while hasattr(traced, name):
        name += "_"
    if isinstance(tensor, nn.Parameter):
        traced.register_parameter(name, tensor)
    else:
        traced.register_buffer(name, tensor)
    return name


@contextlib.contextmanager
def _quiet_guards(mode: FakeTensorMode) -> Iterator[None]:
    """The retracing asks nothing that Dynamo has not asked: what it would guard on is guarded on already."""
    if mode.shape_env is None:
        yield
        return
    with mode.shape_env.suppress_guards():
        yield


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _rename(new: Node, old: Node) -> None:
    new.target = str(old.target)
    new._rename(old.name)
    for key in ("stack_trace", "nn_module_stack"):
        if key in old.meta:
            new.meta[key] = old.meta[key]


def _parameters(
    old: Sequence[Node], new: Sequence[Node], given: Sequence[Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    params: dict[str, Tensor] = {}
    paths: dict[str, str] = {}
    for before, node, value in zip(old, new, given, strict=True):
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            continue
        path = _parameter_path(before)
        if path is None and not isinstance(value, nn.Parameter):
            continue
        params[node.name] = value
        paths[node.name] = path or before.name
    return params, paths


def _parameter_path(node: Node) -> str | None:
    """`fc.weight` for a placeholder that stands for a module's parameter or buffer; None for an input."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    name = name() if callable(name) else name
    if not isinstance(name, str):
        return None
    found = _HELD.search(name) or (
        _ATTRIBUTE.search(name) if isinstance(node.meta.get("example_value"), nn.Parameter) else None
    )
    if found is None:
        return None
    owner = module_path(name[: found.start()])
    return f"{owner}.{found.group(1)}" if owner else found.group(1)
