"""What flows through a quantized graph on a given input: how each value lies, and how much was cut off.

In: the values as `Watched` shows them. Out: node name -> `Flow`; for a quantized activation also the codes
that are used, and which part of the values lay beyond what the codes reach.

    Flow(values=Histogram(...), channels=((5, 31.0),), codes=((-128.0, 40), ...), clipped=0.021)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...formats import Quantized, format
from ...lowering.signal_to_noise import signal_to_noise
from ...passes.provenance import FROM_KEY
from .histogram import Histogram, histogram, outliers
from .tensors import code_counts

QUANTIZE = torch.ops.bitfold.quantize.default
_BINS = 32


@dataclass(frozen=True)
class Flow:
    """values: of a node's result, or of what a `quantize` reads; channels: of the last dimension, those that
    stand out; codes, clipped, sqnr_db: of a `quantize`: how often each is used, which part of the values lay
    beyond them, and signal to noise of the rounding."""

    values: Histogram
    channels: tuple[tuple[int, float], ...] = ()
    codes: tuple[tuple[float, int], ...] = ()
    clipped: float | None = None
    sqnr_db: float = math.nan
    format: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain data, without what is not known."""
        found: dict[str, Any] = {"values": self.values.as_json()}
        if self.channels:
            found["channels"] = [list(one) for one in self.channels]
        if self.codes:
            found |= {
                "codes": [[v, n] for v, n in self.codes],
                "clipped": self.clipped,
                "format": self.format,
            }
        return found


@dataclass
class Flows:
    """Collects: call `see` with each node and its value."""

    found: dict[str, Flow] = field(default_factory=dict)
    _values: dict[str, Any] = field(default_factory=dict)

    def see(self, node: Node, value: Any) -> None:
        """Remember what there is to say of a value."""
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            if any(user.target is QUANTIZE for user in node.users):
                self._values[node.name] = value
            # Nodes that passes made inside of regions are called alike in all of them.
            if node.op == "call_module" or (node.op == "call_function" and FROM_KEY not in node.meta):
                self.found[node.name] = Flow(histogram(value, _BINS), outliers(_by_channel(value)))
        elif node.target is QUANTIZE:
            source = node.args[0]
            given = self._values.get(source.name) if isinstance(source, Node) else None
            if given is not None:
                self.found[node.name] = quantized(given, str(node.args[1]), value)


def quantized(x: Tensor, text: str, parts: list[Tensor]) -> Flow:
    """What `quantize(x, text)`, whose result is `parts`, made of x."""
    fmt = format(text)
    q = Quantized.from_parts(fmt, parts, x.shape[-1])
    exact, rounded = x.to(torch.float32), q.dequantize(torch.float32)
    at_end, step = _last_step(q, rounded)
    # Rounding alone moves a value by half a step.
    beyond = at_end & ((exact - rounded).abs() > 0.55 * step)
    return Flow(
        histogram(x, _BINS),
        outliers(_by_channel(x)),
        code_counts(q),
        float(beyond.sum()) / max(1, beyond.numel()),
        signal_to_noise(exact, rounded),
        text,
    )


def _last_step(q: Quantized, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Where the code is the largest or the smallest that there is, and how far it is to the next one
    inside."""
    element = q.format.element
    words = torch.arange(2**element.bits, dtype=torch.uint8)
    values = element.decode(words)
    order = values.argsort(stable=True)[values.sort(stable=True).values.isfinite()]
    codes = q.format.unpack(q.codes, q.k)
    inner, at_end = codes.clone(), torch.zeros_like(codes, dtype=torch.bool)
    for end, inside in ((order[0], order[1]), (order[-1], order[-2])):
        at_end |= codes == words[end]
        inner[codes == words[end]] = words[inside]
    # Symmetric formats leave the smallest code alone, so the next one is an end too.
    second = codes == words[order[1]]
    if float(values[order[0]]) < -float(values[order[-1]]):
        at_end |= second
        inner[second] = words[order[2]]
    moved = replace(q, codes=q.format.pack(inner)).dequantize(torch.float32)
    return at_end.reshape(rounded.shape), (rounded - moved).abs()


def _by_channel(x: Tensor) -> Tensor:
    return x.detach().abs().reshape(-1, x.shape[-1]).amax(0) if x.ndim > 1 else x.detach().abs()
