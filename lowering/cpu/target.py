"""The CPU target: folded regions as torch that Inductor's C++ runs at the speed of the codes' bytes.

In: a region around a matmul or an embedding, its weight behind a `dequantize`. Out: the region on operators
of `src/bitfold/_operators.py`: a linear on a generated kernel, or, where there is no compiler or no kernel
computes it, on one that is plain torch below, so that any `torch.compile` (not only backend="bitfold") fuses
through it.

    %w = dequantize([%c, %s], "int4[g64]", 576, f32); %y = linear(%x, %w, %b)
    ->  %y = bitfold.fused([%x, %c, %s, %b], "linear 1536x576 f32 int4[g64,planar64] bias")[0]
    or  %y = bitfold.cpu_linear(%x, [%c, %s], "int4[g64,planar]", 576, %b)

    %w = dequantize([%c, %s], "int8", 576, f32); %y = embedding(%w, %i)
    ->  %r = bitfold.rows([%c, %s], "int8", 576, %i); %y = dequantize([%r[0], %r[1]], "int8", 576, f32)

Where both operands are codes with static scales, `static.py` has kernels, of convolutions too. Another
convolution, or an attention, keeps its dequantize: Inductor decodes into memory ahead of the library call.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...codegen import GemmSpec
from ...codegen.cpp.support import cpu_layout, obstacle
from ...codegen.spec import type_name
from ...formats import BitfoldError, Format, Integer, Layout, cache_tag
from ...formats import format as parse
from ...formats.group_lanes import GroupLanes
from ...formats.spare import Spare
from ...passes import Miss, inherit
from ..fused import parsed
from ..inductor import InductorTarget, compiled, dequantized
from ..kv_cache.few_queries import FEW_QUERIES, few_queries
from ..splice import splice
from ..target import KEPT, Compiled
from . import static as cpu_conv
from .beside import beside
from .cache import lower_caches
from .conv_chain import chain
from .cpp_wrapper import options_for
from .forms import MOST_ROWS, Plan, gemv, plan, vector_layout
from .kept_runs import keeper, recalled
from .repeats import compile_alone, compile_repeats

aten = torch.ops.aten
FUSED = torch.ops.bitfold.fused.default
MOST_NODES = 500
"""Of a graph whose calls of kernels become one C++ function."""


def cpu_linear(x: Tensor, parts: Sequence[Tensor], text: str, k: int, bias: Tensor | None = None) -> Tensor:
    """x [..., k] times the weight [N, k] of these parts, transposed, plus bias [N]: [..., N] in x's dtype.

    Compiled for a fixed number of rows up to MOST_ROWS, the codes are read once and no float weight is
    written; the sum is float32, rounded to x's dtype once. Otherwise, and run eagerly, the weight is decoded
    and multiplied by the library. The choice adds no guard, so a varying number of rows stays one graph.
    """
    fmt = parse(text)
    walk = plan(fmt, k) if _may_fuse(x) and isinstance(k, int) else None
    count = x.numel() // k if k else 0
    if (
        not isinstance(walk, Plan)
        or not statically_known_true(count <= MOST_ROWS)
        or not statically_known_true(count > 0)
    ):
        weight = torch.ops.bitfold.dequantize(parts, text, k, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    y = gemv(x.reshape(int(count), k), parts, fmt, walk)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _may_fuse(x: Tensor) -> bool:
    """Whether a compiler is looking: run eagerly, the fused form would write what it is made not to write.

    Under autocast the product is the library's too, in the dtype that autocast gives it; and where gradients
    are wanted, since the backward of the fused form would keep a decoded weight for each row of x.
    """
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return isinstance(x, FakeTensor | FunctionalTensor)


def rows(parts: Sequence[Tensor], text: str, k: int, indices: Tensor) -> list[Tensor]:
    """Rows of a weight [N, k], in parts: those that `indices`, of any shape, name, as [*indices.shape, k]."""
    found = []
    for part in parts:
        if part.shape[0] == 1 and part.numel() == 1:  # one for the whole tensor
            found.append(part.reshape((1,) * (indices.dim() + 1)))
        else:
            taken = part.index_select(0, indices.reshape(-1))
            found.append(taken.reshape(*indices.shape, *part.shape[1:]))
    return found


# Torch's compile caches know the operators by name only; see `formats/cache_tag.py`.
for _name in ("target.py", "forms.py", "values.py"):
    cache_tag.add(Path(__file__).with_name(_name).read_text(encoding="utf-8"))


def _by_kernels_alone(format: Format, k: int) -> bool:
    """Whether a layout is for kernels, though Inductor's loops over it would be no vectors."""
    layout = format.layout
    # A run that is mostly padding is no gain.
    filled = isinstance(layout, GroupLanes) or (isinstance(layout, Spare) and layout.span < 2 * k)
    return format.element.bits == 8 or filled


class CpuTarget(InductorTarget):
    """The processor that torch runs on."""

    name: ClassVar[str] = "cpu"
    device: ClassVar[str] = "cpu"
    # Thirty layers then take as long to compile as plain Inductor's (benchmarks/compile_time.py), not twice.
    shares_regions: ClassVar[bool] = True

    def layout(self, format: Format, k: int) -> Layout:
        found = cpu_layout(format, k) if self.has_kernels() else None
        if found is not None and (_by_kernels_alone(found, k) or plan(found, k)):
            return found.layout
        return vector_layout(format, k) or format.layout

    def layout_for(self, reader: Node, format: Format, k: int) -> Layout:
        """Slices of whole vectors, or panels, where activations' own codes are multiplied."""
        woven = cpu_conv.layout_of(reader) if self.has_kernels() else None
        if woven is not None:
            return woven
        for user in reader.users:
            codes = activation_codes(user)
            if codes is not None and self.has_kernels():
                found = cpu_layout(format, k, parse(str(codes.args[1])))
                if found is not None:
                    return found.layout
        return self.layout(format, k)

    def has_kernels(self) -> bool:
        """Whether kernels can be compiled here: there is a C++ compiler."""
        return self.missing() is None

    def finish(self, gm: GraphModule) -> int:
        """Operations around kernels become part of them; then all kernels are compiled, side by side."""
        if not self.has_kernels():
            return 0
        found = splice(gm) + chain(gm)
        if not torch.is_grad_enabled():
            found += few_queries(gm)
            specs = lower_caches(gm)
            if specs:
                from ...codegen.cpp.attention_build import know_attention

                know_attention(specs)
        calls = gm.graph.find_nodes(op="call_function", target=FUSED)
        if gm.graph.find_nodes(op="call_function", target=FEW_QUERIES):
            from ...codegen.cpp.attention_build import attention_operator

            attention_operator()
        if calls:
            from ...codegen.cpp.build import know

            know(parsed(str(call.args[1])) for call in calls)
        cpu_conv.know(gm)
        return found if torch.is_grad_enabled() else found + beside(gm)

    def compile(self, gm: GraphModule, example_inputs: Sequence[Any], config: Mapping[str, Any]) -> Compiled:
        """Where nothing is differentiated, a layer that occurs many times is compiled once, and a chain of
        convolutions' kernels needs no Python between them."""
        if self.missing() is not None or torch.is_grad_enabled():
            return super().compile(gm, example_inputs, config)

        def of_piece(piece: GraphModule, inputs: list[Any]) -> Compiled:
            return compiled(piece, inputs, {**options_for(piece), **config})

        run = compile_repeats(gm, of_piece)
        if run is None and gm.graph.find_nodes(op="call_function", target=cpu_conv.CONV) and _is_small(gm):
            run = compile_alone(gm, of_piece)
        if run is None:
            return super().compile(gm, example_inputs, config)
        if KEPT in gm.meta:
            key, given = gm.meta[KEPT]
            run.told = keeper(key, given, gm)
        return run

    def recalled(self, key: str) -> Compiled | Miss:
        return recalled(key)

    def lower(self, region: GraphModule) -> GraphModule:
        for node in list(region.graph.nodes):
            if node.target in cpu_conv.TARGETS and self.has_kernels():
                new = cpu_conv.lowered(node)
                if new is not None:
                    node.replace_all_uses_with(new)
                    region.graph.erase_node(node)
                    continue
            if node.target in (aten.linear.default, aten.embedding.default):
                weight = dequantized(node.args[1 if node.target is aten.linear.default else 0])
                new = None if weight is None else _lowered(node, weight, self.has_kernels())
                if new is not None:
                    node.replace_all_uses_with(new)
                    region.graph.erase_node(node)
        region.graph.eliminate_dead_code()
        region.recompile()
        return region

    def missing(self) -> str | None:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "there is no C++ compiler (install g++, or set CXX to one)"
        return None


def _is_small(gm: GraphModule) -> bool:
    """Whether the C++ that calls its kernels is a function that GCC gets through in seconds."""
    return len([node for node in gm.graph.nodes if node.op != "placeholder"]) <= MOST_NODES


def _lowered(node: Node, weight: Node, kernels: bool) -> Node | None:
    if node.target is aten.linear.default:
        return (_kernel(node, weight) if kernels else None) or _linear(node, weight)
    return _embedding(node, weight)


def activation_codes(node: Node) -> Node | None:
    """The `dequantize` of a linear's activations, if a kernel multiplies their codes: int8."""
    given = dequantized(node.args[0]) if node.target is aten.linear.default else None
    if given is None:
        return None
    fmt = parse(str(given.args[1]))
    return given if fmt.element == Integer(8) and fmt.layout.name == "bytes" else None


def _kernel(node: Node, weight: Node) -> Node | None:
    """The linear as a kernel, where there is one for these dtypes and this layout."""
    parts: Any = weight.args[0]
    value, (_, text, k, _) = node.meta["val"], weight.args
    lane = type_name(value.dtype)
    bias = node.args[2] if len(node.args) > 2 else None
    if (
        lane is None
        or not isinstance(k, int)
        or (isinstance(bias, Node) and bias.meta["val"].dtype != value.dtype)
    ):
        return None
    codes = activation_codes(node)
    if codes is None and (other := dequantized(node.args[0])) is not None:
        _say_once(_slower(f"activations in {parse(str(other.args[1]))}", "CPU kernels multiply int8"))
    rows, x = int(weight.meta["val"].shape[0]), [node.args[0]]
    for given in (codes, None) if codes is not None else (None,):
        activation = None if given is None else parse(str(given.args[1]))
        try:
            spec = GemmSpec(parse(str(text)), rows, k, lane, bias is not None, activation)
        except BitfoldError:
            continue
        if (why := obstacle(spec)) is None:
            x = [node.args[0]] if given is None else list(given.args[0])  # type: ignore[arg-type]
            return _call(node, weight, spec, [*x, *parts, *([bias] if bias is not None else [])])
        what = f"activations in {activation}" if given is not None else f"weights in {spec.weight}"
        _say_once(_slower(what, why))
    return None


def _slower(what: str, why: str) -> str:
    return f"no CPU kernel multiplies {what}: {why}; they become floats first, which is slower"


@cache
def _say_once(warning: str) -> None:
    warnings.warn(warning, stacklevel=2)


def _call(node: Node, weight: Node, spec: GemmSpec, inputs: list[Any]) -> Node:
    with node.graph.inserting_before(node):
        call = node.graph.call_function(FUSED, (inputs, str(spec)))
        new = node.graph.call_function(operator.getitem, (call, 0))
    call.meta["val"], new.meta["val"] = [node.meta["val"]], node.meta["val"]
    for made in (call, new):
        inherit(made, [node, weight])
    return new


def _linear(node: Node, weight: Node) -> Node | None:
    parts, text, k, _ = weight.args
    bias = node.args[2] if len(node.args) > 2 else None
    with node.graph.inserting_before(node):
        new = node.graph.call_function(
            torch.ops.bitfold.cpu_linear.default, (node.args[0], parts, text, k, bias)
        )
    new.meta["val"] = node.meta["val"]
    return inherit(new, [node, weight])


def _embedding(node: Node, weight: Node) -> Node | None:
    """Gather rows of codes, then decode only those; bitwise what the lookup in the decoded table gives."""
    parts, text, k, dtype = weight.args
    fmt = parse(str(text))
    if fmt.scale is not None and fmt.scale.granularity.is_block:
        return None  # neighbouring rows share a scale, so a row alone is no tensor of this format
    graph = node.graph
    with graph.inserting_before(node):
        taken = graph.call_function(torch.ops.bitfold.rows.default, (parts, text, k, node.args[1]))
        indices: Any = node.args[1]
        taken.meta["val"] = _fake_rows(parts, str(text), k, indices)
        pieces = [graph.call_function(operator.getitem, (taken, i)) for i in range(len(fmt.parts))]
        for piece, value in zip(pieces, taken.meta["val"], strict=True):
            piece.meta["val"] = value
        new = graph.call_function(torch.ops.bitfold.dequantize.default, (pieces, text, k, dtype))
    new.meta["val"] = node.meta["val"]
    for made in (taken, *pieces, new):
        inherit(made, [node, weight])
    return new


def _fake_rows(parts: Any, text: str, k: Any, indices: Node) -> list[Tensor]:
    fakes = [part.meta["val"] for part in parts]
    length = k.meta["val"] if isinstance(k, Node) else k
    with indices.meta["val"].fake_mode, torch.no_grad():
        return rows(fakes, text, length, indices.meta["val"])
