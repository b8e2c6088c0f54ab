"""The linears of sites whose rounding can be learned, and running modules on what was learned so far.

In: sites with drafts, or codes and the weights that they came of. Out: a `Rounding` for each weight, by its
path; the values that a module's forward is given in place of its parameters.

    found = roundings(sites, "model.layers.0")       {"mlp.up_proj.weight": (node, Rounding), ...}
    called(block, as_read(values, found), args, kwargs)

Embeddings, convolutions, experts and weights that are a computed part of a parameter are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Node

from ...formats import Quantized, format
from ...formats.sparsity import Dense
from ...passes import expression
from ...passes.algorithms.draft import DRAFT, Draft, rows_of
from ...passes.algorithms.rounding import Rounding
from ...passes.anchors import TARGETS
from ...passes.note import Note, annotated
from ..module_scope import Site
from ..turned import turned
from .correct_biases import FLOAT

Learnt = dict[str, tuple[Node, Rounding]]
"""The anchor and the rounding of each weight, by the parameter's path."""


def roundings(sites: Sequence[Site], root: str) -> Learnt:
    """By paths that begin behind `root`."""
    found: Learnt = {}
    for site in sites:
        for node, note in annotated(site.gm):
            operand = node.args[TARGETS[node.target][2]]
            held = expression(site.gm, operand) if isinstance(operand, Node) else None
            if held is None or held.text or note.anchor != "linear" or not note.weight or note.stored:
                continue
            fmt, draft = format(note.weight), _draft(site, node, note)
            if draft is None or fmt.scale is None or not isinstance(fmt.sparsity, Dense):
                continue
            name = _full(site.path, held.path).removeprefix(root).strip(".")
            found[name] = node, Rounding(fmt, draft, turned(node))
    return found


def as_read(values: Mapping[str, Tensor], learnt: Learnt) -> dict[str, Tensor]:
    """The weights for modules that run no transform of their inputs yet."""
    return {
        name: torch.ops.bitfold.hadamard(value, True) if learnt[name][1].turned else value
        for name, value in values.items()
    }


def called(module: nn.Module, values: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """The module with these in place of its parameters, in their dtypes."""
    held = {name: value.to(module.get_parameter(name).dtype) for name, value in values.items()}
    return functional_call(module, held, args, kwargs, tie_weights=False)


def _draft(site: Site, node: Node, note: Note) -> Draft | None:
    """What has been decided, beside the float weight that it was decided for."""
    found = node.meta.get(DRAFT)
    if isinstance(found, Draft):
        return found
    if not isinstance(found, Quantized):
        return None
    weight = node.meta.get(FLOAT)
    if weight is None:
        weight = rows_of(site.gm, node, note)
    elif turned(node):
        weight = torch.ops.bitfold.hadamard(weight)
    return None if weight is None else Draft(weight.float(), tuple(found.params), found.dequantize())


def _full(path: str, own: str) -> str:
    return own if not path or own.startswith(path + ".") else f"{path}.{own}"
