"""What the numbers of a prepared model were trained as, as text: it goes into its state dict, and a state of
another recipe or other options is told by it.

In: the graph of a module or of a program that trains, and its options. Out: one line for each rounding and
one for the schedule, without paths in the module scope, where a layer may move (an adapter around it, say).

    weight int4[g32] lsq
    input int8[tensor] clip
    warmup 0, observe 200, rate 0.1, freeze_norm None

How a rounding is computed (`+keep`, `+kernel`, `+fused`) changes no number, and `start` none but the first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ...formats import BitfoldError
from ...formats.gradient import Gradient
from ...passes import state
from ...passes.edges import edge
from ...passes.training.batch_norm import FOLD_NORM
from ...passes.training.quantizers import TRAIN_QUANTIZE
from .options import Qat

CACHED = "cached"
"""The operand of an edge whose number goes to a cache."""


def trained_as(gm: GraphModule, how: Qat) -> str:
    """See the file. A cache, and an attention without one that is trained in its stead, are alike."""
    lines = []
    for node in gm.graph.find_nodes(op="call_function", target=TRAIN_QUANTIZE):
        on = edge(node)
        assert on is not None, f"{node.name} stands on no edge"
        gradient = replace(Gradient.parse(str(node.args[2])), keep=False, kernel=False, fused=False)
        which = "input" if on.which == CACHED else on.which
        layer = state(gm).own(on.layer)
        lines.append(" ".join(word for word in (layer, which, on.format, str(gradient)) if word))
    lines += ["batch norm folded in"] * len(gm.graph.find_nodes(op="call_function", target=FOLD_NORM))
    schedule = (f"{name} {getattr(how, name)}" for name in ("warmup", "observe", "rate", "freeze_norm"))
    return "\n".join([*sorted(lines), ", ".join(schedule)])


def as_bytes(text: str) -> Tensor:
    """A tensor, since what gathers and writes state dicts expects tensors."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def check_trained_as(here: str, saved: Any, path: str) -> None:
    """Raises BitfoldError if the extra state of a module or program, if there is one, says something else."""
    saved = saved.get("trains") if isinstance(saved, dict) else saved
    if not isinstance(saved, Tensor):
        return
    there = bytes(saved.cpu().tolist()).decode(errors="replace")
    if there == here:
        return
    ours, theirs = Counter(here.split("\n")), Counter(there.split("\n"))
    layer = path.rstrip(".") or "(the model)"
    raise BitfoldError(
        f"layer {layer} is prepared as {_short(ours - theirs)!r}, and the state was trained as "
        f"{_short(theirs - ours)!r}; give bf.prepare_qat the recipe and the options of that run"
    )


def _short(lines: Counter[str]) -> str:
    """The first two of the lines that only one of both has, as often as it has them more."""
    return "; ".join(sorted(lines.elements())[:2]) or "nothing beside what both have"
