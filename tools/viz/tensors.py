"""The folded weights one by one: their values, the codes that are used, the scales, the rows that stand out.

In: a graph with codes, its regions put back, and the graph before. Out: name of the codes' attribute ->
`WeightStats`.

    weight_stats(flat, reference)["fc_weight_codes"]
    ->  WeightStats(format="int4[g64]", values=Histogram(...), codes=((-7.0, 12), (-6.0, 90), ...),
                    scales=Histogram(...), rows=((417, 12.5),), sqnr_db=21.3, row_sqnr_db=nan)

Values are the unquantized weight's where the graph before has it, else what the codes decode to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...formats import Format, Quantized, format
from ...formats.granularity import Granularity
from ...formats.layout import default
from ...lowering.install import weight_parts
from ...lowering.signal_to_noise import signal_to_noise
from ...passes import constant
from ...passes.anchors import TARGETS
from ...passes.provenance import FROM_KEY, origin
from ...passes.stages import find_attribute
from .histogram import Histogram, histogram, outliers, spread


@dataclass(frozen=True)
class WeightStats:
    """codes: (value of the code, how often it is used), by value; scales: of their logarithms to base 2;
    rows: those that stand out; spread: the largest row over the middle one; sqnr_db: signal to noise of the
    weight itself; row_sqnr_db: the same with one scale a row, where the format has one for all (NaN
    elsewhere); shares_scales: another weight whose scales these are."""

    name: str
    layer: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    values: Histogram
    codes: tuple[tuple[float, int], ...]
    scales: Histogram | None
    rows: tuple[tuple[int, float], ...]
    spread: float
    sqnr_db: float = math.nan
    row_sqnr_db: float = math.nan
    shares_scales: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain data; what is not a number is left out."""
        found = {
            "format": self.format,
            "shape": list(self.shape),
            "values": self.values.as_json(),
            "codes": [[value, count] for value, count in self.codes],
            "scales": self.scales.as_json() if self.scales is not None else None,
            "rows": [list(row) for row in self.rows],
            "spread": self.spread,
            "sqnr_db": self.sqnr_db,
        }
        return {key: value for key, value in found.items() if not _no_number(value)}


def weight_stats(flat: GraphModule, reference: GraphModule | None) -> dict[str, WeightStats]:
    """By the attribute that holds a weight's codes."""
    found: dict[str, WeightStats] = {}
    holders: dict[int, str] = {}  # where a weight's scales lie -> the first weight that has them there
    with torch.no_grad():
        for names, q, reader in _weights(flat):
            exact = _unquantized(reference, reader)
            stats = _stats(names[0], q, reader, exact)
            held = [find_attribute(flat, name) for name in names[1:]]
            first = holders.setdefault(held[0].data_ptr(), names[0]) if held else names[0]
            found[names[0]] = replace(stats, shares_scales="" if first == names[0] else first)
    return found


def _weights(flat: GraphModule) -> Iterator[tuple[tuple[str, ...], Quantized, Node]]:
    """(attributes, codes and scales, a node that stands for the layer)."""
    nodes = {str(node.target): node for node in flat.graph.find_nodes(op="get_attr")}
    for names, text, k in weight_parts(flat):
        q = Quantized.from_parts(format(text), [find_attribute(flat, name) for name in names], k)
        yield names, q, nodes[names[0]]


def _unquantized(reference: GraphModule | None, reader: Node) -> Tensor | None:
    """The weight of the captured node that the codes were made for."""
    if reference is None:
        return None
    names = reader.meta.get(FROM_KEY, ())
    for node in reference.graph.nodes:
        if node.name in names and node.target in TARGETS:
            operand = node.args[TARGETS[node.target][2]]
            return constant(reference, operand) if isinstance(operand, Node) else None
    return None


def _stats(name: str, q: Quantized, reader: Node, exact: Tensor | None) -> WeightStats:
    decoded = q.dequantize(torch.float32)
    if exact is not None and exact.numel() == decoded.numel():
        exact = exact.detach().to(torch.float32).reshape(decoded.shape)
    else:
        exact = None
    values = decoded if exact is None else exact
    largest = values.abs().reshape(-1, values.shape[-1]).amax(1) if values.numel() else values.reshape(-1)
    return WeightStats(
        name,
        origin(reader).module_path,
        without_layout(str(q.format)),
        tuple(decoded.shape),
        q.nbytes,
        histogram(values),
        code_counts(q),
        _scales(q),
        outliers(largest),
        spread(largest),
        math.nan if exact is None else signal_to_noise(exact, decoded),
        math.nan if exact is None else _by_row(q.format, exact),
    )


@lru_cache(maxsize=4096)
def without_layout(text: str) -> str:
    """The format as a recipe says it: where its bits lie is the target's choice."""
    found = format(text)
    return str(replace(found, layout=default(found.element.bits)))


def code_counts(q: Quantized) -> tuple[tuple[float, int], ...]:
    """How often each code is used, in the order of what they stand for."""
    codes = q.format.unpack(q.codes, q.k).reshape(-1).to(torch.int64)
    size = 2**q.format.element.bits
    counts = torch.bincount(codes, minlength=size)[:size]
    values = q.format.element.decode(torch.arange(size, dtype=torch.uint8))
    known = [(float(v), int(n)) for v, n in zip(values, counts, strict=True) if math.isfinite(float(v)) or n]
    merged: dict[float, int] = {}
    for value, count in known:
        merged[value + 0.0] = merged.get(value + 0.0, 0) + count
    return tuple(sorted((v if math.isfinite(v) else math.copysign(1e308, v), n) for v, n in merged.items()))


def _scales(q: Quantized) -> Histogram | None:
    scale = q.format.scale
    if scale is None or q.scales is None or q.scales.numel() == 0:
        return None
    decoded = scale.decode(q.scales).to(torch.float32)
    positive = decoded[decoded > 0]
    return histogram(positive.log2()) if positive.numel() else None


def _by_row(given: Format, exact: Tensor) -> float:
    """What a scale for each row would give, where all rows share one."""
    scale = given.scale
    if scale is None or not (scale.granularity.rows is None and scale.granularity.cols is None):
        return math.nan
    finer = replace(given, scale=replace(scale, granularity=Granularity(1, None)), layout=given.layout)
    return signal_to_noise(exact, finer.dequantize(finer.quantize(exact), torch.float32))


def _no_number(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
