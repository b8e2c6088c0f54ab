"""From the folded graph of one module to a folded module that runs on a target: shared by quantize and load.

In: a module, and its folded graph as data with codes and scales by name. Out: the module folded in place,
with a body lowered to the target, and with that canonical graph, which is what `bf.save` writes.

    graph: linear(x, dequantize([weight_codes, weight_scales], "int4[g128]", ...), bias)
    ->  module.codes, module.scales, module.bias
        body(codes, scales, bias, x) = cpu_linear(x, [codes, scales], "int4[g128,planar]", ...)

A model has hundreds of layers and few kinds of them: each kind is lowered once.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ..formats import BitfoldError, Quantized, format
from ..passes import MissRecord, Pipeline, Stage, state
from ..passes.fuse import Fuse, inline
from ..passes.stages import find_attribute
from .cpu import conv
from .files.graph_data import Data, tensor_names
from .files.graph_data import load as load_graph
from .files.graph_values import enum_value
from .folded import fold_module
from .folded_weight import Canonical, FoldedWeight, Steps
from .fused import weights_of
from .lower import Lower
from .target import default_target, get_target

CANONICAL = "bitfold_canonical"
"""In the meta of a lowered program: its folded graph as data, which is what a file says of it."""

Parts = tuple[str, ...]
Kind = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Source:
    """A parameter that is folded: its name in the module, its shape, and its first path in the model.

    `back` leads from the decoded rows to it. `codes` says which codes these are: two sources share their
    parts if it is equal (and the format too).
    """

    name: str
    shape: tuple[int, ...]
    path: str
    back: Steps | None
    codes: Hashable


Sources = tuple[Mapping[Node, Source], torch.dtype]
"""What is about to become codes in a module, by the anchor that reads it, and the dtype it computes in."""


@dataclass(frozen=True)
class _Lowered:
    """What a target made of one kind of module.

    `attributes`: the body's leading inputs. `layouts`: format by parts. `tensors`: the constants themselves
    if the target made others than the canonical ones in another layout, so that they hold for one module
    only. `bodies`: the body under the names of the modules' own inputs, one for all modules that are alike,
    so that `torch.compile` compiles one of them.
    """

    body: GraphModule
    attributes: list[str]
    layouts: dict[Parts, str]
    tensors: dict[str, Tensor] | None
    misses: list[MissRecord]
    bodies: dict[Hashable, GraphModule] = field(default_factory=dict)

    def named(self, names: Mapping[str, str]) -> GraphModule:
        key = tuple(names.items())
        if key not in self.bodies:
            self.bodies[key] = _renamed(self.body, names)
        return self.bodies[key]


@dataclass
class Installer:
    """Folds modules of one model for one target; holds the parameters that tied weights share.

    `misses`: what the target did not take, by the module's path.
    """

    target: str
    shared: dict[Hashable, nn.Parameter] = field(default_factory=dict)
    kinds: dict[Hashable, _Lowered] = field(default_factory=dict)
    misses: list[MissRecord] = field(default_factory=list)

    def install(
        self,
        path: str,
        module: nn.Module,
        graph: Data,
        tensors: Mapping[str, Tensor],
        sources: Mapping[str, Source],
        dtype: torch.dtype,
        *,
        ranks: tuple[int, ...] | None = None,
        gm: GraphModule | None = None,
    ) -> None:
        """Fold `module`, which is at `path`, in place. `graph` and `tensors`: its folded graph; `sources`:
        what is folded in it, by the attribute of the codes.

        `gm` is that graph if it is there already. The module is written last, when nothing can fail any more.
        """
        weights = folded_weights(graph, sources)
        names = _operand_names(module, graph, weights)
        lowered = self._lower(graph, tensors, gm)
        held = [_as_held(weight, names, lowered.layouts) for weight in weights]
        parts: dict[str, nn.Parameter] = {}
        for weight, here in zip(weights, held, strict=True):
            parts |= self._parts(sources[weight.parts[0]].codes, weight, here, tensors, lowered)
        for name in lowered.attributes:
            if name not in parts and module._parameters.get(names.get(name, name), self) is None:
                # A bias that the module did not have: a batch norm is folded into it.
                module._parameters[names[name]] = nn.Parameter(tensors[name].detach(), requires_grad=False)
        operands: dict[str, Tensor] = {}
        for name in lowered.attributes:
            known = (module._parameters.get(name), module._buffers.get(name), parts.get(name))
            tensor = next((one for one in known if one is not None), None)
            operands[names.get(name, name)] = (lowered.tensors or tensors)[name] if tensor is None else tensor
        self.misses += [replace(miss, module_path=path) for miss in lowered.misses]
        canonical = Canonical(graph, names, ranks)
        fold_module(module, lowered.named(names), operands, tuple(held), dtype, canonical)

    def _lower(self, graph: Data, tensors: Mapping[str, Tensor], gm: GraphModule | None) -> _Lowered:
        about = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in sorted(tensors.items()))
        key = (json.dumps(graph), about)
        if key not in self.kinds:
            device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
            gm = gm if gm is not None else load_graph(graph, tensors, device)
            known = len(state(gm).misses)
            made = lower_graph(gm, self.target)
            found = _lowered(made, graph, tensors, state(made).misses[known:])
            if found.tensors is not None:
                return found
            self.kinds[key] = found
        return self.kinds[key]

    def _parts(
        self,
        codes: Hashable,
        weight: FoldedWeight,
        here: FoldedWeight,
        tensors: Mapping[str, Tensor],
        lowered: _Lowered,
    ) -> dict[str, nn.Parameter]:
        """The parts of one weight in the target's layout, by attribute; the same ones for a tied weight."""
        keys = {part: (codes, here.format, index) for index, part in enumerate(weight.parts)}
        if not all(key in self.shared for key in keys.values()):
            own = lowered.tensors or _laid_out(weight, here.format, tensors)
            for part, key in keys.items():
                self.shared[key] = nn.Parameter(own[part].detach(), requires_grad=False)
        return {part: self.shared[key] for part, key in keys.items()}


def _laid_out(weight: FoldedWeight, text: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = [tensors[part] for part in weight.parts]
    if text != weight.format:
        canonical = Quantized.from_parts(format(weight.format), parts, weight.k)
        parts = format(weight.format).relayout(canonical, format(text).layout).parts
    return dict(zip(weight.parts, parts, strict=True))


def _lowered(
    made: GraphModule, graph: Data, tensors: Mapping[str, Tensor], misses: list[MissRecord]
) -> _Lowered:
    """What a target made, and whether its constants are the canonical ones in the layouts that it says."""
    layouts = {parts: text for parts, text, _ in weight_parts(made)}
    body, attributes = _lift(made)
    expected = dict(tensors)
    for parts, text, k in canonical_parts(graph):
        if parts in layouts and format(layouts[parts]).parts == format(text).parts:
            weight = FoldedWeight("", (), "", text, text, k, parts)
            expected |= _laid_out(weight, layouts[parts], tensors)
    own = {name: find_attribute(made, name) for name in attributes}
    same = all(name in expected and _same_bits(tensor, expected[name]) for name, tensor in own.items())
    return _Lowered(body, attributes, layouts, None if same else own, misses)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    # As bytes: not every dtype that scales have knows equality, and NaN is not equal to itself.
    one, other = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


def weight_parts(gm: GraphModule) -> Iterator[tuple[Parts, str, int]]:
    """(attributes, format, K) of every folded weight, whichever operator reads it."""
    seen: set[Parts] = set()
    for node in gm.graph.nodes:
        for parts, text, k in _read_by(node):
            held = [part for part in parts if isinstance(part, Node) and part.op == "get_attr"]
            names = tuple(str(part.target) for part in held)
            if names and len(names) == len(parts) and names not in seen:
                seen.add(names)
                yield names, text, k


def _read_by(node: Node) -> Iterator[tuple[Sequence[object], str, int]]:
    """(parts, format, K) among a call's arguments: spelled so, or said by a kernel's text."""
    if node.op != "call_function":
        return
    if node.target is torch.ops.bitfold.fused.default:
        yield from weights_of(node)
        return
    if node.target is torch.ops.bitfold.conv.default:
        yield from conv.weights_of(node)
        return
    for parts, text, k in zip(node.args, node.args[1:], node.args[2:], strict=False):
        if isinstance(parts, list | tuple) and isinstance(text, str) and isinstance(k, int):
            yield parts, text, k


def canonical_parts(graph: Data) -> list[tuple[Parts, str, int]]:
    """`weight_parts` of a folded graph that is data."""
    found: dict[Parts, tuple[Parts, str, int]] = {}
    for names, args in _decoded(graph):
        found.setdefault(names, (names, args[1], args[2]))
    return list(found.values())


def decoded_dtypes(graph: Data) -> dict[Parts, torch.dtype]:
    """What each weight of a folded graph that is data is decoded to."""
    return {names: enum_value("dtype", args[3]["dtype"]) for names, args in _decoded(graph)}


def _decoded(graph: Data) -> Iterator[tuple[Parts, list[Any]]]:
    """The attributes that each `dequantize` reads, and its arguments."""
    attributes = {node["name"]: node["target"] for node in graph["nodes"] if node["op"] == "get_attr"}
    for node in graph["nodes"]:
        if node.get("target") == "bitfold.dequantize.default":
            names = tuple(attributes.get(part["node"], "") for part in node["args"][0])
            if all(names):
                yield names, node["args"]


def folded_weights(graph: Data, sources: Mapping[str, Source]) -> list[FoldedWeight]:
    """The weights of a folded graph, their parts by attribute name."""
    found = []
    for parts, text, k in canonical_parts(graph):
        about = sources[parts[0]]
        found.append(FoldedWeight(about.name, about.shape, about.path, text, text, k, parts, about.back))
    return found


@lru_cache(maxsize=1024)
def part_kinds(text: str, shape: tuple[int, ...]) -> list[Kind]:
    """Dtype and shape of each part of a tensor of this shape in a format."""
    parts = format(text).quantize(torch.empty(shape, device="meta")).parts
    return [(part.dtype, tuple(part.shape)) for part in parts]


def resolve_target(name: str | None, device: torch.device) -> str:
    """The target's name, checked; None is the default for tensors on `device`."""
    if name is None:
        return default_target(device)
    for one in name.split(","):
        get_target(one.strip())
    return name


def lower_graph(gm: GraphModule, target: str) -> GraphModule:
    """`gm` for `target`, regions put back into one graph; the reference runs the folded graph as it is."""
    if target == "reference" or state(gm).stage >= Stage.lowered:
        return gm
    Pipeline([Fuse(), Lower(target=target)]).run(gm, record=False)
    inline(gm)
    for name in target.split(","):
        get_target(name.strip()).finish(gm)
    gm.recompile()
    return gm


def _lift(gm: GraphModule) -> tuple[GraphModule, list[str]]:
    """`gm` without a tensor: its attributes come first among the inputs. Returns it, and them in order."""
    attributes = list(dict.fromkeys(str(n.target) for n in gm.graph.nodes if _is_tensor(gm, n)))
    graph = Graph()
    inputs = {name: graph.placeholder(name.replace(".", "_")) for name in attributes}
    moved: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if _is_tensor(gm, node):
            moved[node] = inputs[str(node.target)]
            continue
        moved[node] = graph.node_copy(node, moved.__getitem__)
        moved[node].meta = {}
    root = nn.Module()
    for name, child in gm.named_children():
        if isinstance(child, GraphModule):
            root.add_module(name, child)
    graph.eliminate_dead_code()
    return GraphModule(root, graph), attributes


def _renamed(body: GraphModule, names: Mapping[str, str]) -> GraphModule:
    """The body with its inputs by the module's names."""
    graph, moved = Graph(), dict[Node, Node]()
    for node in body.graph.nodes:
        if node.op == "placeholder":
            moved[node] = graph.placeholder(names.get(str(node.target), str(node.target)))
        else:
            moved[node] = graph.node_copy(node, moved.__getitem__)
    return GraphModule(body, graph)


def _is_tensor(gm: GraphModule, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(find_attribute(gm, str(node.target)), Tensor)


def _operand_names(module: nn.Module, graph: Data, weights: list[FoldedWeight]) -> dict[str, str]:
    """What each attribute of the folded graph is called in the module: `weight_codes` is `codes`."""
    gone = {weight.name for weight in weights}
    names: dict[str, str] = {}
    for attribute in tensor_names(graph):
        if attribute in module._parameters or attribute in module._buffers:
            names[attribute] = attribute
            continue
        short = attribute.removeprefix("weight_") if gone == {"weight"} else attribute.replace(".", "_")
        free = short if not hasattr(module, short) and short not in names.values() else f"folded_{attribute}"
        if hasattr(module, free) or free in names.values():
            raise BitfoldError(
                f"a {type(module).__name__} has an attribute {free!r} already, which its codes need"
            )
        names[attribute] = free
    return names


def _as_held(weight: FoldedWeight, names: Mapping[str, str], layouts: Mapping[Parts, str]) -> FoldedWeight:
    """The same weight: parts by the module's names, format with the layout that the target chose."""
    text = layouts.get(weight.parts, weight.format)
    if format(text).parts != format(weight.format).parts:
        raise BitfoldError(f"the target made {text} of {weight.format}, which stores other parts")
    return replace(weight, format=text, parts=tuple(names.get(part, part) for part in weight.parts))
