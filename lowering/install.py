"""From the folded graph of one module to a folded module that runs on a target: shared by quantize and load.

In: a module, and its folded graph with codes and scales as attributes. Out: the module folded in place, with
a body lowered to the target, and with the canonical graph as data, which is what `bf.save` writes.

    gm: linear(x, dequantize([self.weight_codes, self.weight_scales], "int4[g128]", ...), self.bias)
    ->  module.codes, module.scales, module.bias;  body(codes, scales, bias, x) = cpu_linear(x, [codes,
    scales], ...)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ..formats import BitfoldError, format
from ..passes import Pipeline, Stage, state
from ..passes.fuse import Fuse, inline
from ..passes.stages import find_attribute
from .folded import Canonical, FoldedWeight, Steps, fold_module
from .graph_data import dump

CANONICAL = "bitfold_canonical"
"""In the meta of a lowered program: its folded graph as data, which is what a file says of it."""


@dataclass(frozen=True)
class Source:
    """A parameter that is folded: its shape, its first path in the model, the way back from decoded rows."""

    shape: tuple[int, ...]
    path: str
    back: Steps | None


@dataclass
class Installer:
    """Folds modules of one model for one target; holds the parameters that tied weights share."""

    target: str
    shared: dict[Hashable, nn.Parameter] = field(default_factory=dict)

    def install(
        self,
        module: nn.Module,
        gm: GraphModule,
        sources: Mapping[str, Source],
        dtype: torch.dtype,
        ranks: tuple[int, ...] | None = None,
    ) -> None:
        """Fold `module` in place: `gm` is its folded graph, `sources` its parameters that are gone from
        there.

        The module is written last, when nothing is left that may fail.
        """
        canonical = dump(gm)
        weights = folded_weights(gm, sources)
        names = _operand_names(module, gm, weights)
        lowered = lower_graph(gm, self.target)
        layouts = {parts: text for parts, text, _ in weight_parts(lowered)}
        body, attributes = lift(lowered, names)
        held = [_as_held(weight, names, layouts) for weight in weights]
        keys: dict[str, Hashable] = {}
        for weight, here in zip(weights, held, strict=True):
            keys |= {part: (weight.path, weight.back, here.format, part) for part in weight.parts}
        operands = {_name(names, name): self._operand(module, lowered, name, keys) for name in attributes}
        fold_module(module, body, operands, tuple(held), dtype, Canonical(canonical, names, ranks))

    def _operand(
        self, module: nn.Module, lowered: GraphModule, name: str, keys: Mapping[str, Hashable]
    ) -> Tensor:
        """The operand at attribute `name`: a tensor that the module has, a part that a tied weight has, or a
        new part.
        """
        for own in (module._parameters, module._buffers):
            found = own.get(name)
            if found is not None:
                return found
        tensor = find_attribute(lowered, name)
        if name not in keys:
            return nn.Parameter(tensor.detach(), requires_grad=False)
        if keys[name] not in self.shared:
            self.shared[keys[name]] = nn.Parameter(tensor.detach(), requires_grad=False)
        return self.shared[keys[name]]


def weight_parts(gm: GraphModule) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """(attributes, format, K) of every folded weight, whichever operator reads it: a list of attributes, then
    a format.
    """
    seen: set[tuple[str, ...]] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        for parts, text, k in zip(node.args, node.args[1:], node.args[2:], strict=False):
            if not isinstance(parts, list | tuple) or not isinstance(text, str) or not isinstance(k, int):
                continue
            names = tuple(
                str(part.target) for part in parts if isinstance(part, Node) and part.op == "get_attr"
            )
            if names and len(names) == len(parts) and names not in seen:
                seen.add(names)
                yield names, text, k


def folded_weights(gm: GraphModule, sources: Mapping[str, Source]) -> list[FoldedWeight]:
    """The weights of a canonical folded graph, their parts by attribute name."""
    found = []
    for parts, text, k in weight_parts(gm):
        stem = parts[0].removesuffix("_codes")
        name = next((one for one in sources if stem == one.replace(".", "_")), None)
        if name is None:
            name = next(one for one in sources if stem.startswith(one.replace(".", "_")))
        about = sources[name]
        found.append(FoldedWeight(name, about.shape, about.path, text, text, k, parts, about.back))
    return found


def resolve_target(name: str | None, device: torch.device) -> str:
    """The target's name, checked; None is the default for tensors on `device`."""
    from .target import default_target, get_target

    if name is None:
        return default_target(device)
    get_target(name)
    return name


def lower_graph(gm: GraphModule, target: str) -> GraphModule:
    """`gm` rewritten for `target`, regions put back into one graph; the reference runs the folded graph as it
    is.
    """
    if target == "reference" or state(gm).stage >= Stage.lowered:
        return gm
    from .lower import Lower

    Pipeline([Fuse(), Lower(target=target)]).run(gm)
    inline(gm)
    gm.recompile()
    return gm


def lift(gm: GraphModule, names: Mapping[str, str]) -> tuple[GraphModule, list[str]]:
    """`gm` without a tensor: its attributes come first among the inputs. Returns it, and the attributes in
    order.
    """
    attributes = list(dict.fromkeys(str(n.target) for n in gm.graph.nodes if _is_tensor(gm, n)))
    graph = Graph()
    inputs = {name: graph.placeholder(_name(names, name)) for name in attributes}
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


def _is_tensor(gm: GraphModule, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(find_attribute(gm, str(node.target)), Tensor)


def _name(names: Mapping[str, str], attribute: str) -> str:
    return names.get(attribute, attribute)


def _operand_names(module: nn.Module, gm: GraphModule, weights: list[FoldedWeight]) -> dict[str, str]:
    """What each attribute of the folded graph is called in the module: `weight_codes` is `codes`."""
    gone = {weight.name for weight in weights}
    names: dict[str, str] = {}
    for node in gm.graph.nodes:
        if not _is_tensor(gm, node) or str(node.target) in names:
            continue
        attribute = str(node.target)
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


def _as_held(
    weight: FoldedWeight, names: Mapping[str, str], layouts: Mapping[tuple[str, ...], str]
) -> FoldedWeight:
    """The same weight: parts by the module's names, format with the layout that the target chose."""
    text = layouts.get(weight.parts, weight.format)
    if format(text).parts != format(weight.format).parts:
        raise BitfoldError(f"the target made {text} of {weight.format}, which stores other parts")
    return replace(weight, format=text, parts=tuple(_name(names, part) for part in weight.parts))
