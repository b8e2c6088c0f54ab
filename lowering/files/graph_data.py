"""A graph as data: what is written of a program, and of each quantized module, into a file.

In: a GraphModule of operators on constants and inputs. Out: a JSON-able dict without a single weight, from
which `load` builds the same graph around tensors that it is given, symbolic sizes included.

    dump(gm)  ->  {"nodes": [{"name": "x", "op": "placeholder", "target": "x", "val": {"dtype": "float32",
                   "shape": ["s0", 64]}}, {"name": "w", "op": "get_attr", "target": "w"}, ...],
                   "symbols": {"s0": {"hint": 5, "min": 0, "max": null}}}
    load(data, {"w": tensor})  ->  GraphModule

Names and values are checked by `graph_values`. A node keeps the module path that it came from, not the source
line: that would carry the paths of the machine that saved the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ...formats import BitfoldError
from ...passes import origin, state
from ...passes.provenance import FROM_KEY
from ...passes.stages import find_attribute
from .graph_shapes import Symbols, restore_values
from .graph_tree import dump_signature, set_signature
from .graph_values import GraphDataError, decode, encode, plain_name, plain_path, target_name, target_of

Data = dict[str, Any]

_OPS = ("placeholder", "get_attr", "call_function", "call_module", "output")


def dump(gm: GraphModule) -> Data:
    """The graph of `gm` as JSON data. Raises GraphDataError for what no file can hold."""
    symbols, here = Symbols(), state(gm)
    # A module's nodes are named without its place in the model, so that equal layers give equal data.
    prefix = here.path_prefix.replace(".", "_") + "_" if here.path_prefix else ""
    data = _dump_graph(gm, symbols, prefix)
    found = symbols.data()
    if found:
        data["symbols"] = found
    data["scope"] = here.scope
    return data


def tensor_names(data: Data) -> list[str]:
    """The dotted names of the tensors that the graph takes from its module, each once, in order of use."""
    names = _own_tensors(data)
    for name, inner in data.get("graphs", {}).items():
        names += [f"{name}.{tensor}" for tensor in tensor_names(inner)]
    return list(dict.fromkeys(names))


def _own_tensors(data: Data) -> list[str]:
    """Those of the graph itself, without the graphs in it."""
    graphs = data.get("graphs", {})
    read = [node["target"] for node in data["nodes"] if node["op"] == "get_attr"]
    return list(dict.fromkeys(name for name in read if name not in graphs))


def load(data: Data, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> GraphModule:
    """The GraphModule that `dump` wrote, on `tensors` (by dotted name; a Parameter stays one).

    Raises GraphDataError for data that is no graph, or wants a tensor that `tensors` lacks.
    """
    try:
        gm = _load_graph(data, tensors, device)
        restore_values(gm, data, device)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, BitfoldError):
            raise
        raise GraphDataError(f"the graph in this file is damaged: {type(error).__name__}: {error}") from error
    return gm


def _dump_graph(gm: GraphModule, symbols: Symbols, prefix: str) -> Data:
    nodes: list[Data] = []
    graphs: dict[str, Data] = {}
    names = _names(gm, prefix)
    for node in gm.graph.nodes:
        nodes.append(_dump_node(node, symbols, names))
        if node.op in ("call_module", "get_attr"):
            held = find_attribute(gm, str(node.target))
            if isinstance(held, GraphModule):
                graphs[str(node.target)] = _dump_graph(held, symbols, prefix)
            elif node.op == "call_module":
                raise GraphDataError(
                    f"node {node.name!r} calls a {type(held).__name__}, which cannot be saved; run `fold` "
                    "first"
                )
    data: Data = {"nodes": nodes}
    if graphs:
        data["graphs"] = graphs
    signature = dump_signature(gm.graph)
    if signature is not None:
        data["signature"] = signature
    return data


def _names(gm: GraphModule, prefix: str) -> dict[Node, str]:
    """What each node is called in the data: its name, less the prefix where it has it."""
    taken = {node.name for node in gm.graph.nodes}
    names: dict[Node, str] = {}
    for node in gm.graph.nodes:
        short = node.name.removeprefix(prefix) if prefix else node.name
        names[node] = short if short.isidentifier() and short not in taken else node.name
        taken.add(names[node])
    return names


def _dump_node(node: Node, symbols: Symbols, names: Mapping[Node, str]) -> Data:
    if node.op not in _OPS:
        raise GraphDataError(f"node {node.name!r} is a {node.op}, which cannot be saved")
    data: Data = {"name": names[node], "op": node.op}
    try:
        if node.op != "output":
            data["target"] = target_name(node.target) if node.op == "call_function" else str(node.target)
        if node.args and node.op != "placeholder":
            data["args"] = [encode(argument, names.__getitem__) for argument in node.args]
        if node.kwargs:
            data["kwargs"] = {name: encode(value, names.__getitem__) for name, value in node.kwargs.items()}
        if node.op == "placeholder":
            data["val"] = symbols.value(node.meta.get("val"))
            if node.args:
                data["default"] = encode(node.args[0], names.__getitem__)
    except GraphDataError as error:
        path = origin(node).module_path
        raise GraphDataError(f"node {node.name!r}" + (f" of {path}" if path else "") + f": {error}") from None
    path = origin(node).module_path
    if path:
        data["module"] = path
    return data


def _load_graph(data: Data, tensors: Mapping[str, Tensor], device: torch.device | None) -> GraphModule:
    root = nn.Module()
    for name, inner in data.get("graphs", {}).items():
        prefix = plain_path(name) + "."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        place(root, name, _load_graph(inner, own, device))
    for name in _own_tensors(data):
        if name not in tensors:
            raise GraphDataError(f"the graph wants a tensor {name!r} that the file does not have")
        place(root, plain_path(name), tensors[name])
    graph = Graph()
    nodes: dict[str, Node] = {}
    for entry in data["nodes"]:
        name = plain_name(entry["name"])
        nodes[name] = _load_node(graph, name, entry, nodes, device)
    gm = GraphModule(root, graph)
    set_signature(gm, data.get("signature"))
    gm.recompile()
    return gm


def _load_node(
    graph: Graph, name: str, entry: Data, nodes: Mapping[str, Node], device: torch.device | None
) -> Node:
    op = entry["op"]
    node: Node
    args = tuple(decode(argument, nodes, device) for argument in entry.get("args", ()))
    kwargs = {plain_name(key): decode(value, nodes, device) for key, value in entry.get("kwargs", {}).items()}
    if op == "output":
        node = graph.output(*args)
    elif op == "call_function":
        node = graph.create_node(op, target_of(entry["target"]), args, kwargs, name=name)
    elif op == "placeholder":
        default = (decode(entry["default"], nodes, device),) if "default" in entry else ()
        node = graph.create_node(op, plain_name(entry["target"]), default, name=name)
    elif op in ("get_attr", "call_module"):
        node = graph.create_node(op, plain_path(entry["target"]), args, kwargs, name=name)
    else:
        raise GraphDataError(f"the graph in this file has a node of kind {op!r}, which means nothing")
    node.meta[FROM_KEY] = (name,)
    path = entry.get("module")
    if path:
        node.meta["nn_module_stack"] = {str(path): (str(path), "")}
    return node


def place(root: nn.Module, path: str, value: Any) -> None:
    """Put a Parameter, a tensor (as a buffer) or a module at a dotted path, making the modules on the way."""
    *parents, last = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    elif isinstance(value, Tensor):
        root.register_buffer(last, value)
    else:
        root.add_module(last, value)
