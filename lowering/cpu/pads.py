"""Pads: zeros that a graph puts around an image become the padding of the convolution that reads it.

In: a graph on `bitfold.conv`. Out: the same numbers; where a pad stood between a kernel and the next one's
`quantize`, nothing does.

    %p = pad(%x, [0, 1, 0, 1]); %q = quantize(%p, "int8[tensor]", [%s]); conv([%q[0], ..], "conv .. s2x2 ..")
    ->  %q = quantize(%x, "int8[tensor]", [%s]);   conv([%q[0], ..], "conv .. s2x2 p0x0x1x1 ..")

Models ported from TensorFlow pad so, since of an odd number of zeros more go to the right and below than a
convolution of torch's can say. A kernel pads with the code of 0, which is what a padded 0 would have become:
no number changes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...passes import inherit
from ...passes.edges import epochs
from ...passes.edit import arguments
from .conv import parsed
from .moved_codes import QUANTIZE, scales_of, static

aten = torch.ops.aten
CONV = torch.ops.bitfold.conv.default
Sides = tuple[int, int, int, int]
"""Top, left, bottom, right."""


def take_pads(gm: GraphModule) -> int:
    """Number of kernels that pad themselves now."""
    since = epochs(gm)
    found = 0
    for node in gm.graph.find_nodes(op="call_function", target=CONV):
        found += _taken(gm, node, since)
    return found


def _taken(gm: GraphModule, conv: Node, since: dict[Node, int]) -> bool:
    inputs: Any = conv.args[0]
    text = conv.args[1]
    spec, codes = parsed(str(text)), inputs[0]
    if not spec.kernel or not isinstance(codes, Node) or codes.target is not operator.getitem:
        return False
    quantize = codes.args[0]
    if codes.args[1] != 0 or not isinstance(quantize, Node) or not static(quantize):
        return False
    pad: Any = quantize.args[0]
    sides = _sides(pad) if isinstance(pad, Node) else None
    if sides is None or since.get(pad) != since.get(quantize):
        return False
    top, left, bottom, right = (a + b for a, b in zip(spec.padding, sides, strict=True))
    source = pad.args[0]
    with gm.graph.inserting_before(quantize):
        new = gm.graph.call_function(QUANTIZE, (source, quantize.args[1], scales_of(quantize)))
        part = gm.graph.call_function(operator.getitem, (new, 0))
    value = source.meta["val"].to(torch.uint8)
    new.meta["val"] = [value, *(scale.meta["val"] for scale in scales_of(quantize))]
    part.meta["val"] = value
    for made in (new, part):
        inherit(made, [pad, quantize])
    rest = inputs[spec.weight_at :]
    conv.args = (
        [part, *scales_of(quantize), *rest],
        str(replace(spec, padding=(top, left, bottom, right))),
    )
    # What nobody reads any more must not count as a reader of the float image.
    for old in (*quantize.users, quantize, pad):
        if not old.users:
            gm.graph.erase_node(old)
    return True


def _sides(node: Node) -> Sides | None:
    """How many zeros a node puts around the last two dimensions; None if it does something else."""
    if node.target is aten.pad.default:
        source, sizes, mode, value = arguments(node)
    elif node.target is aten.constant_pad_nd.default:
        (source, sizes, value), mode = arguments(node), "constant"
    else:
        return None
    if mode != "constant" or value not in (None, 0) or not isinstance(source, Node):
        return None
    if not _zeros_only(sizes):
        return None
    left, right, top, bottom = (*sizes[:4], 0, 0, 0, 0)[:4]
    line = source.meta["val"].ndim == 3  # of images [channels, width] the last dimension alone is padded
    return None if line and (top or bottom) else (top, left, bottom, right)


def _zeros_only(sizes: Sequence[object]) -> bool:
    """Whether nothing is cut off, no size varies, and images and channels are as many as before."""
    known = all(isinstance(size, int) and size >= 0 for size in sizes)
    return known and not any(sizes[4:])
