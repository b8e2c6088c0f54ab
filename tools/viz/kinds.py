"""What each node of a stage became: the one word that gives it its colour.

Comes in: a step's snapshot. Goes out: node name -> kind.

    w_deq = bitfold.dequantize([w_codes, w_scales], "int4[g128]"); linear = aten.linear(x, w_deq)
    ->  {"w_codes": "weight", "w_scales": "weight", "w_deq": "dequantize", "linear": "compute"}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...passes.trace import GraphSnapshot, NodeSnapshot


@dataclass(frozen=True)
class Kind:
    """One entry of the page's legend."""

    key: str
    text: str
    meaning: str


KINDS = (
    Kind("weight", "quantized weight", "codes, scales and zero points in the format's layout"),
    Kind("quantize", "activation quantize", "an activation is turned into codes while the model runs"),
    Kind("dequantize", "dequantize", "codes are turned into floats"),
    Kind("observe", "observer or fake quantize", "ranges are recorded, or rounding is imitated for training"),
    Kind("compute", "runs on quantized data", "an operation that reads dequantized values"),
    Kind("fused", "fused region", "several operations outlined into one, or a generated kernel"),
    Kind("annotated", "to be quantized", "a recipe has given it formats, nothing is folded yet"),
    Kind("missed", "missed", "the recipe asked for something here that was not done"),
    Kind("untouched", "untouched", "an operation as the model has it"),
    Kind("parameter", "float weight", "a parameter or buffer as the model has it"),
    Kind("input", "input or output", "what the model takes and returns"),
)

# These move values and leave them as they are, so what they read is still dequantized data.
_VIEWS = frozenset(
    (
        "aten.alias", "aten.clone", "aten.contiguous", "aten.detach", "aten.expand", "aten.permute",
        "aten.reshape", "aten.select", "aten.slice", "aten.squeeze", "aten.t", "aten.to", "aten.transpose",
        "aten.unsqueeze", "aten.view",
    )
)  # fmt: skip

_PARTS = ("codes", "scales", "zeros", "scale", "indices")


def kinds_of(
    snapshot: GraphSnapshot,
    *,
    missed: Collection[str] = (),
    parameters: Collection[str] = (),
    before: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The kind of every node. `parameters`: placeholders that are weights (frame scope). `before`: kinds in
    the stage before, so that codes stay known as such once a region hides the operator that reads them."""
    by_name = {node.name: node for node in snapshot}
    kinds: dict[str, str] = {}
    views: set[str] = set()  # nodes that hand on dequantized values unchanged
    for node in snapshot:
        kind = _kind(node, kinds, by_name)
        if node.op == "placeholder" and node.name in parameters:
            kind = "parameter"
        if kind == "parameter" and (before or {}).get(node.name) == "weight":
            kind = "weight"
        if kind in ("untouched", "annotated"):
            read = [kinds[name] == "dequantize" or name in views for name in node.inputs]
            if any(read) and _short(node.target) in _VIEWS:
                views.add(node.name)
                kind = "dequantize"
            elif any(read):
                kind = "compute"
        if kind in ("untouched", "annotated") and node.name in missed:
            kind = "missed"
        kinds[node.name] = kind
    return kinds


def _kind(node: NodeSnapshot, known: Mapping[str, str], by_name: Mapping[str, NodeSnapshot]) -> str:
    if node.op in ("placeholder", "output"):
        return "input"
    if node.op == "get_attr":
        if node.shape is None:
            return "untouched"  # a graph that a higher-order operator runs, not a tensor
        return "weight" if _is_part(node, by_name) else "parameter"
    if node.op == "call_module":
        return "fused" if node.format else "observe"
    match _short(node.target):
        case "bitfold.quantize":
            return "quantize"
        case "bitfold.dequantize":
            return "dequantize"
        case "bitfold.fake_quantize":
            return "observe"
        case "getitem" if known.get(node.inputs[0]) in ("quantize", "fused"):
            return known[node.inputs[0]]
        case target if target.startswith("bitfold."):
            return "fused"
    return "annotated" if node.note else "untouched"


def _is_part(node: NodeSnapshot, by_name: Mapping[str, NodeSnapshot]) -> bool:
    """Codes, scales or zero points: what `dequantize` reads; of what a kernel reads, that which is called so
    (a bias is read too)."""
    readers = {_short(by_name[user].target) for user in node.users}
    if "bitfold.dequantize" in readers:
        return True
    named = node.target.replace(".", "_").rpartition("_")[2] in _PARTS
    return named and any(reader.startswith("bitfold.") for reader in readers)


def _short(target: str) -> str:
    """`aten.linear.default` -> `aten.linear`."""
    return ".".join(target.replace("::", ".").split(".")[:2])
