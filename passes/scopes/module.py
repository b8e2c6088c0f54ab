"""Module scope: one module alone, as a graph, whatever the model around it does.

Comes in: a module that owns parameters, example arguments, and its path in the model. Goes out: a graph at
stage `captured` that shares the module's parameters, with symbolic leading sizes.

    capture_module(model.fc, (torch.empty(2, 16),), path="fc")
    ->  x: f32[s0, 16];  linear = aten.linear.default(x, weight, bias)

A model has hundreds of layers and few kinds of them: with `cache` (a dict that the caller keeps for the
length of one model) each kind is traced once and copied after that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    SymbolicContext,
)
from torch.fx.traceback import preserve_node_meta, set_current_meta
from torch.utils import _pytree as pytree

from ...formats.errors import BitfoldError
from ..core import State, state
from ..normalize import Normalize
from ..provenance import breaking_point, inherit, inside_module
from ..verify import verify

Cache = dict[Any, tuple[Graph, FakeTensorMode]]

# Their forward methods read only what `_signature` sees, so that a traced graph may be shared by signature.
_STOCK = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
_METHODS = ("forward", "_conv_forward")


def example_for(module: nn.Module) -> tuple[Tensor, ...] | None:
    """Arguments that the module can be traced with, made from its own sizes; None for a kind not known here.

    The arguments hold no data of interest, only shape, dtype and device: batch 2, and space for one kernel.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    if isinstance(module, nn.Linear):
        return (torch.zeros(2, module.in_features, **like),)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return (torch.zeros(2, module.in_channels, *(max(size, 2) + 1 for size in reach), **like),)
    if isinstance(module, nn.Embedding):
        return (torch.zeros(2, 3, dtype=torch.int64, device=weight.device),)
    return None


def capture_module(
    module: nn.Module,
    example_args: Sequence[Any],
    *,
    path: str,
    dynamic_batch: bool = True,
    cache: Cache | None = None,
) -> GraphModule:
    """One module as a normalized graph; its parameters are shared, not copied.

    With `dynamic_batch`, every size of a floating input but the last is symbolic (for a convolution: all but
    the channels), and every size of an integer one, but for numbers one for each expert. Raises BitfoldError,
    naming `path`, if it does not trace.
    """
    key = _signature(module, example_args, dynamic_batch) if cache is not None else None
    known = cache.get(key) if cache is not None and key is not None else None
    if known is None:
        gm, mode = _trace(module, example_args, path, dynamic_batch)
        if cache is not None and key is not None:
            cache[key] = (_copy(gm.graph), mode)
    else:
        gm, mode = GraphModule(_holder(module), _copy(known[0])), known[1]
    gm.meta["bitfold"] = State("module", path_prefix=path)
    state(gm).fake_mode = mode
    return gm


def _signature(module: nn.Module, args: Sequence[Any], dynamic_batch: bool) -> Any:
    """What decides the graph of a stock module; None for a module that has to be traced each time."""
    stock = _stock_class(module)
    if stock is None or not all(isinstance(a, Tensor) for a in args):
        return None
    held = [*module.named_parameters(), *module.named_buffers()]
    return (
        type(module).forward,
        stock,
        stock.extra_repr(module),  # a subclass may say less of itself
        module.training,
        dynamic_batch,
        tuple((name, tuple(t.shape), t.dtype, t.device, t.requires_grad) for name, t in held),
        tuple((tuple(a.shape), a.dtype, a.device) for a in args),
    )


def is_stock(module: nn.Module) -> bool:
    """Whether the module runs torch's own code for its kind, whatever its class adds, so that its graph holds
    for any rank of input and in both modes.
    """
    return _stock_class(module) is not None


def _stock_class(module: nn.Module) -> Any:
    cls = next((cls for cls in _STOCK if isinstance(module, cls)), None)
    own = any(
        name in module.__dict__ or getattr(type(module), name, None) is not getattr(cls, name, None)
        for name in _METHODS
    )
    return None if own else cls


def _copy(graph: Graph) -> Graph:
    fresh = Graph()
    fresh.output(fresh.graph_copy(graph, {}))
    return fresh


def _holder(module: nn.Module) -> nn.Module:
    """The module's tensors under their own names, without its code."""
    holder = nn.Module()
    for path, parameter in module.named_parameters(remove_duplicate=False):
        owner, name = _owner(holder, path)
        owner.register_parameter(name, parameter)
    for path, buffer in module.named_buffers(remove_duplicate=False):
        owner, name = _owner(holder, path)
        owner.register_buffer(name, buffer)
    return holder


def _owner(holder: nn.Module, path: str) -> tuple[nn.Module, str]:
    *parts, name = path.split(".")
    for part in parts:
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    return holder, name


def _trace(
    module: nn.Module, args: Sequence[Any], path: str, dynamic_batch: bool
) -> tuple[GraphModule, FakeTensorMode]:
    held: dict[str, Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    flat, spec = pytree.tree_flatten(tuple(args))
    wide = [_widened(value) if dynamic_batch else value for value in flat]
    try:
        traced, mode = _run(module, held, wide, spec, dynamic_batch)
    except Exception:
        # A module that reads a size of 1 as a constant is traced with it.
        try:
            traced, mode = _run(module, held, flat, spec, dynamic_batch)
        except Exception as error:
            kind, reason = type(module).__name__, breaking_point(error)
            raise BitfoldError(
                f"the module '{path}' ({kind}) cannot be traced alone: {reason} "
                "(let a rule of the recipe skip it)"
            ) from error
    return _finish(traced, module, list(held), len(flat)), mode


def _run(
    module: nn.Module, held: dict[str, Tensor], flat: list[Any], spec: Any, dynamic_batch: bool
) -> tuple[GraphModule, FakeTensorMode]:
    # Without duck shaping two sizes that are equal in the example are still two sizes.
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=False)
    fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in held.values()]
    inputs = [_symbolic(mode, module, value, dynamic_batch) for value in flat]

    def run(*given: Any) -> Any:
        named = dict(zip(held, given[len(flat) :], strict=True))
        return functional_call(module, named, pytree.tree_unflatten(list(given[: len(flat)]), spec))

    stock = is_stock(module)
    with mode, preserve_node_meta(), _paths_recorded(module):
        trace = make_fx(run, pre_dispatch=True, tracing_mode="real", record_stack_traces=not stock)
        return trace(*inputs, *fakes), mode


def _widened(value: Any) -> Any:
    """The same shape with a batch of 2 for a batch of 1, which a tracer takes for a constant."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != 1:
        return value
    return value.repeat_interleave(2, 0)


@contextlib.contextmanager
def _paths_recorded(module: nn.Module) -> Iterator[None]:
    """Lets each node that is traced inside a child module say so, the way Dynamo and export do."""
    entered: list[contextlib.AbstractContextManager[None]] = []
    hooks = []

    def enter(path: str, child: nn.Module) -> Any:
        here = Graph().placeholder("here")
        here.meta["nn_module_stack"] = {path: (path, type(child))}

        def hook(*_: Any) -> None:
            entered.append(set_current_meta(here))
            entered[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    for path, child in module.named_modules():
        if path:
            hooks.append(child.register_forward_pre_hook(enter(path, child)))
            hooks.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _finish(traced: GraphModule, module: nn.Module, held: list[str], inputs: int) -> GraphModule:
    """Parameters become attributes, inputs get plain names, the origin is this module."""
    graph = traced.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for index, node in enumerate(placeholders[:inputs]):
        node.target = "x" if inputs == 1 else f"x{index}"
        node._rename(str(node.target))
    for name, node in zip(held, placeholders[inputs:], strict=True):
        if node.users:
            with graph.inserting_before(node):
                attribute = graph.create_node("get_attr", name, (), {}, name=name.replace(".", "_"))
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    for node in graph.nodes:
        if "stack_trace" in node.meta:
            node.meta["stack_trace"] = inside_module(node.meta["stack_trace"])
        node.meta.pop("from_node", None)
        if node.op in ("call_function", "get_attr"):
            inherit(node, [node])
    gm = GraphModule(_holder(module), graph)
    for name, value in vars(traced).items():
        # Constants and subgraphs that the tracer itself made.
        if isinstance(value, Tensor):
            setattr(gm, name, value)
    for name, child in traced.named_children():
        gm.add_module(name, child)
    gm.meta["bitfold"] = State("module")
    Normalize().apply(gm)
    gm.recompile()
    verify(gm, state(gm).stage, after="capture")
    return gm


def _symbolic(mode: FakeTensorMode, module: nn.Module, value: Any, dynamic_batch: bool) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    fixed = _fixed_dims(module, value) if dynamic_batch else set(range(value.dim()))
    sizes = [DimDynamic.STATIC if dim in fixed else DimDynamic.DYNAMIC for dim in range(value.dim())]
    context: SymbolicContext = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(value, symbolic_context=context)


def _fixed_dims(module: nn.Module, value: Tensor) -> set[int]:
    if not value.is_floating_point():
        return {0} if _counts_experts(module, value) else set()
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return {1}
    return {value.dim() - 1}


def _counts_experts(module: nn.Module, value: Tensor) -> bool:
    """Whether these are numbers one for each matrix of a weight [E, .., ..]: where each expert's rows end."""
    return value.dim() == 1 and any(p.dim() == 3 and p.shape[0] == len(value) for p in module.parameters())
