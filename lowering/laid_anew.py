"""A folded module that was laid out on another processor, laid out for this one: once, when it is unpickled.

In: a body, its weights, and the module's parameters. Out: the three as kernels of this processor read them.

    pickled with AVX2:  codes of int4[g64,lanes.planar64], fused([x, codes, scales], ".. int4[g64,lanes..]")
    here, AVX-512:      codes of int4[g64,planar128],      fused([x, codes, scales], ".. int4[g64,planar128]")

Every value stays; a file of `bf.save` needs none of this, since its codes lie as no processor's do. Where
kernels compute no such product at all, it is of torch's operators from then on. What kernels of all
processors read stays as it lies, though it may not be what these would choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn
from torch.fx import GraphModule

from ..codegen import GemmSpec
from ..codegen.cpp.support import cpu_layout, obstacle
from ..codegen.cpp.vectors import widest
from ..formats import Quantized, format
from ..formats.group_lanes import GroupLanes
from .cpu.target import FUSED, CpuTarget
from .folded_weight import FoldedWeight
from .fused import parsed
from .retype import changed_body
from .splice import expanded

Parameters = Mapping[str, nn.Parameter | None]
Told = dict[tuple[str, int], str]
"""The new format of a weight, by its old one and its K."""

_ANEW = "_bitfold_laid_anew"
"""On codes that lie otherwise here: the new parts, by format, so that tied weights stay tied."""


def laid_anew(
    body: GraphModule, weights: tuple[FoldedWeight, ...], parameters: Parameters
) -> tuple[GraphModule, tuple[FoldedWeight, ...], dict[str, nn.Parameter | None]]:
    """All three for this processor; what is given stays as it is."""
    told: Told = {
        (one.format, one.k): _format_here(body, one) for one in weights if _foreign(one, parameters)
    }
    found = dict(parameters)
    if not told:
        return body, weights, found
    here = tuple(replace(one, format=told.get((one.format, one.k), one.format)) for one in weights)
    for old, new in zip(weights, here, strict=True):
        if old.format != new.format:
            found |= zip(old.parts, _parts(old, new, parameters), strict=True)
    key = ("layout", *sorted(told.items()))
    return changed_body(body, key, partial(_rewrite, told=told)), here, found


def _foreign(weight: FoldedWeight, parameters: Parameters) -> bool:
    """Whether kernels of this processor never read a weight as it lies. One on a GPU, or in shards, is not
    theirs."""
    return (
        isinstance(format(weight.format).layout, GroupLanes)
        and not widest().lanes
        and all(
            type(part) is nn.Parameter and part.device.type == "cpu" for part in _held(weight, parameters)
        )
    )


def _held(weight: FoldedWeight, parameters: Parameters) -> list[nn.Parameter]:
    parts = [parameters.get(name) for name in weight.parts]
    return [part for part in parts if part is not None]


def _format_here(body: GraphModule, weight: FoldedWeight) -> str:
    """As `quantize` and `load` lay it out: for the codes of activations, if it is multiplied by these."""
    canonical = format(weight.canonical)
    for spec in _specs(body):
        if (str(spec.weight), spec.k) == (weight.format, weight.k) and spec.activation is not None:
            found = cpu_layout(canonical, weight.k, spec.activation)
            if found is not None:
                return str(found)
    return str(canonical.with_layout(CpuTarget().layout(canonical, weight.k)))


def _specs(body: GraphModule) -> Iterator[GemmSpec]:
    for part in body.modules():
        if isinstance(part, GraphModule):
            for call in part.graph.find_nodes(op="call_function", target=FUSED):
                yield parsed(str(call.args[1]))


def _parts(old: FoldedWeight, new: FoldedWeight, parameters: Parameters) -> Sequence[nn.Parameter]:
    held = _held(old, parameters)
    made: dict[str, list[nn.Parameter]] = held[0].__dict__.setdefault(_ANEW, {})
    if new.format not in made:
        codes = Quantized.from_parts(format(old.format), [part.detach() for part in held], old.k)
        moved = format(old.format).relayout(codes, format(new.format).layout).parts
        made[new.format] = [nn.Parameter(part, requires_grad=False) for part in moved]
    return made[new.format]


def _rewrite(body: GraphModule, told: Told) -> None:
    """Says the new formats in every call that reads one of the weights."""
    for node in list(body.graph.nodes):
        if node.op == "call_module":
            inner = body.get_submodule(str(node.target))
            if isinstance(inner, GraphModule):
                _rewrite(inner, told)
        elif node.target is FUSED:
            spec = parsed(str(node.args[1]))
            text = told.get((str(spec.weight), spec.k))
            if text is not None:
                spec = replace(spec, weight=format(text))
                node.args = (node.args[0], str(spec))
                if obstacle(spec) is not None or not CpuTarget().has_kernels():
                    expanded(body.graph, node, spec.dtype)
        elif node.op == "call_function":
            after = (*node.args[1:], None)
            said = zip(node.args, after, strict=True)
            node.args = tuple(
                told.get((one, k), one) if isinstance(one, str) and isinstance(k, int) else one
                for one, k in said
            )
    body.recompile()
