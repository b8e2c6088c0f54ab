"""Constants of a graph: which nodes are known ahead of the call, what they hold, and where they come from.

Comes in: a node. Goes out: its tensor, the parameter behind it, or None.

    get_attr fc.weight -> t -> to(bfloat16)   constant()   -> the tensor
                                              expression() -> Expression('fc.weight', 't.to(bfloat16)')

A parameter is a `get_attr` in the program and module scopes, and in the frame scope a placeholder whose real
tensor is in `State.params`. What the graph writes to (running statistics in training, a cache) is no
constant.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.operator_schemas import normalize_function

from .core import State, state
from .edit import argument, fake_mode, free_name
from .provenance import inherit
from .stages import find_attribute

__all__ = [
    "Expression",
    "add_constant",
    "constant",
    "constant_nodes",
    "erase_dead_constants",
    "expression",
    "is_parameter_expr",
    "mutated",
    "source_parameter",
    "value_of",
]

aten = torch.ops.aten

# Operators that only look at a tensor differently or cast it: through these a weight stays that weight.
VIEWS = frozenset(
    {
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.detach.default,
        aten.alias.default,
        aten.numpy_T.default,
        aten.mT.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten._to_copy.default,
        aten.type_as.default,
    }
)

# Operators that cut a tensor: a piece of a weight is a slice of it.
_CUTS = frozenset(
    {
        aten.chunk.default,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.tensor_split.sections,
        aten.tensor_split.indices,
        aten.unbind.int,
    }
)

Step = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An operator and its arguments behind the first."""


@dataclass(frozen=True)
class Expression:
    """A constant as a chain of views and casts of one parameter.

    `path` is the parameter's path in the user's model, `parameter` the user's tensor, `text` the chain
    ("" for the parameter itself), fit for a cache key.
    """

    path: str
    parameter: Tensor
    text: str
    steps: tuple[Step, ...]
    source: Node

    def apply(self, parameter: Tensor) -> Tensor:
        """The same chain on another tensor of the same shape (a newer version of the parameter, a fake)."""
        return applied(self.steps, parameter)


def applied(steps: Sequence[Step], parameter: Tensor) -> Tensor:
    """The value of a chain on a parameter."""
    value = parameter.detach()
    for target, rest, kwargs in steps:
        value = target(value, *rest, **kwargs)
    return value


def expression(gm: GraphModule, node: Node) -> Expression | None:
    """`node` as a chain of views and casts of one parameter, or None."""
    here = state(gm)
    steps: list[Step] = []
    while node.op == "call_function":
        found = _piece(node) if node.target is operator.getitem else _view(node)
        if found is None:
            return None
        step, node = found
        steps.append(step)
    leaf = _leaf(gm, here, node)
    if leaf is None:
        return None
    steps.reverse()
    return Expression(_path(here, node), leaf, ".".join(map(_step_text, steps)), tuple(steps), node)


def _view(node: Node) -> tuple[Step, Node] | None:
    """A view or cast as a step, and what it is taken of."""
    if node.target not in VIEWS or not node.args or not isinstance(node.args[0], Node):
        return None
    rest, kwargs = tuple(node.args[1:]), dict(node.kwargs)
    if _has_node(rest) or _has_node(kwargs):
        return None
    return (node.target, rest, kwargs), node.args[0]


def _piece(node: Node) -> tuple[Step, Node] | None:
    """`getitem(chunk(w, 3), 1)` as the slice of w that it is."""
    cut, index = node.args
    if not isinstance(cut, Node) or cut.target not in _CUTS or not isinstance(index, int):
        return None
    source, dim, pieces = cut.args[0], int(argument(cut, "dim", 0)), cut.meta["val"]
    assert isinstance(source, Node)
    if cut.target is aten.unbind.int:
        return (aten.select.int, (dim, index), {}), source
    ends = list(accumulate(piece.shape[dim] for piece in pieces))
    if not all(isinstance(end, int) for end in ends):
        return None
    end = ends[index]
    return (aten.slice.Tensor, (dim, end - pieces[index].shape[dim], end), {}), source


def _step_text(step: Step) -> str:
    target, rest, kwargs = step
    given = [str(value) for value in rest] + [f"{key}={value}" for key, value in kwargs.items()]
    return f"{target._schema.name.removeprefix('aten::')}({','.join(given)})".replace(" ", "")


def is_parameter_expr(gm: GraphModule, node: Node) -> bool:
    """Whether `node` is a parameter, or views and casts of one."""
    return expression(gm, node) is not None


def source_parameter(gm: GraphModule, node: Node) -> tuple[str, Tensor] | None:
    """Path in the user's model and tensor of the parameter behind `node`, or None."""
    found = expression(gm, node)
    return None if found is None else (found.path, found.parameter)


def constant(gm: GraphModule, node: Node) -> Tensor | None:
    """The value of a constant (attributes, frame parameters, pure operators on those), or None."""
    here = state(gm)
    below = list(_below(node))
    if not all(_may_be_constant(gm, here, step) for step in below):
        return None
    result = value_of(gm, node, {})
    return result if isinstance(result, Tensor) else None


def value_of(gm: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    """The value of a node known to be constant; `values` keeps what was computed on the way."""
    here = state(gm)
    for step in _below(node, values):
        values[step] = _evaluate(gm, here, step, values)
    return values[node]


def constant_nodes(gm: GraphModule) -> set[Node]:
    """Every node that can be computed before the call, in one walk over the graph.

    In the frame scope this counts the user's parameters, which hold still during a call only.
    """
    here = state(gm)
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if _may_be_constant(gm, here, node) and all(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _may_be_constant(gm: GraphModule, here: State, node: Node) -> bool:
    if node.op in ("get_attr", "placeholder"):
        return _leaf(gm, here, node) is not None
    return is_pure(node)


def _below(node: Node, known: Container[Node] = ()) -> Iterator[Node]:
    """The nodes that `node` is computed from, inputs first, ending with itself; not what is `known`."""
    done: set[Node] = set()
    stack = [(node, False)]
    while stack:
        current, ready = stack.pop()
        if current in done or current in known:
            continue
        if ready:
            done.add(current)
            yield current
            continue
        stack.append((current, True))
        stack.extend((source, False) for source in current.all_input_nodes if source not in done)


def _evaluate(gm: GraphModule, here: State, node: Node, values: dict[Node, Any]) -> Any:
    if node.op in ("get_attr", "placeholder"):
        leaf = _leaf(gm, here, node)
        assert leaf is not None, f"{node.name} is no constant"
        return leaf.detach()
    with torch.no_grad():
        return node.target(  # type: ignore[operator]
            *map_arg(node.args, values.__getitem__), **map_arg(node.kwargs, values.__getitem__)
        )


def is_pure(node: Node) -> bool:
    """Whether the node is an operator that writes to nothing and draws no random numbers."""
    target = node.target
    if node.op != "call_function":
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in ("_operator", "math")
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return not node.is_impure()


def _leaf(gm: GraphModule, here: State, node: Node) -> Tensor | None:
    if node.op == "placeholder":
        return None if node.name in mutated(gm) else here.params.get(node.name)
    if node.op != "get_attr" or str(node.target) in mutated(gm):
        return None
    found = find_attribute(gm, str(node.target))
    return found if isinstance(found, Tensor) else None


def _path(here: State, node: Node) -> str:
    if node.op == "placeholder":
        return here.param_paths.get(node.name, node.name)
    return here.path(str(node.target))


def _has_node(value: Any) -> bool:
    found: list[Node] = []
    map_arg(value, found.append)
    return bool(found)


def mutated(gm: GraphModule) -> frozenset[str]:
    """Attributes and placeholders that some operator of the graph writes to, directly or through a view.

    Looked up once per graph: passes never add an operator that writes.
    """
    here = state(gm)
    if here.mutated is None:
        names: set[str] = set()
        for node in gm.graph.nodes:
            for written in _written(node):
                names.add(_root(written))
        here.mutated = frozenset(names)
    return here.mutated


def _written(node: Node) -> Iterator[Node]:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return
    if target is aten.batch_norm.default:
        # Its schema does not say so, but in training it writes the running mean and variance.
        if node.args[5] is True:
            yield from (arg for arg in node.args[3:5] if isinstance(arg, Node))
        return
    if not target._schema.is_mutable:
        return
    arguments = normalize_function(target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)
    given = arguments.kwargs if arguments is not None else {}
    for parameter in target._schema.arguments:
        if parameter.alias_info is None or not parameter.alias_info.is_write:
            continue
        found: list[Node] = []
        map_arg(given.get("input" if parameter.name == "self" else parameter.name), found.append)
        yield from found


def _root(node: Node) -> str:
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return str(node.target) if node.op == "get_attr" else node.name


def add_constant(gm: GraphModule, name: str, tensor: Tensor, like: Node) -> Node:
    """Register `tensor` as a buffer of `gm` and return a `get_attr` for it, placed before `like`.

    The attribute is called `name` as `free_name` makes it an identifier. The node has the origin of
    `like` and a fake value in the graph's own mode.
    """
    free = free_name(gm, name)
    if tensor._base is not None and tensor.untyped_storage().nbytes() > tensor.nbytes:
        # A view would keep all of the tensor alive that it looks at.
        tensor = tensor.clone()
    gm.register_buffer(free, tensor)
    with gm.graph.inserting_before(like):
        node = gm.graph.create_node("get_attr", free, (), {}, name=free)
    node.meta["val"] = _fake_of(tensor, fake_mode(gm))
    return inherit(node, [like])


def _fake_of(tensor: Tensor, mode: FakeTensorMode) -> FakeTensor:
    """A fake of fixed size, made directly: 0.05 ms, where from_tensor() or an empty() takes 2 to 4."""
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, meta, tensor.device)


def erase_dead_constants(gm: GraphModule) -> int:
    """Delete parameters, buffers and submodules that no node names; return how many tensors went."""
    used = {str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")}
    kept = used | {path.rsplit(".", count)[0] for path in used for count in range(1, path.count(".") + 1)}
    erased = 0
    for path, module in list(gm.named_modules(remove_duplicate=False)):
        if path and path not in kept:
            continue
        if path in used:
            continue
        prefix = f"{path}." if path else ""
        for held in (module._parameters, module._buffers):
            for name in [name for name in held if f"{prefix}{name}" not in used]:
                erased += held[name] is not None
                delattr(module, name)
        for name in [name for name in module._modules if f"{prefix}{name}" not in kept]:
            erased += _tensors(module._modules[name])
            delattr(module, name)
    return erased


def _tensors(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(1 for _ in module.parameters()) + sum(1 for _ in module.buffers())
