"""What the numbers of a prepared model were trained as, as text: it goes into its state dict, and a state of
another recipe or other options is told by it.

In: the graph of a module or of a program that trains, and its options. Out: one line for each rounding and
one for the schedule, without paths in the module scope, where a layer may move (an adapter around it, say).

    weight int4[g32] lsq
    input int8[tensor] clip
    warmup 0, observe 200, rate 0.1, freeze_norm None

Where a teacher speaks, a state says before them the version of this text and that one's mark:

    version 2
    teacher 8f3a0c..

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
from ...passes.training.evaluated import FOLD_NORM
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
        layer = state(gm).local(on.layer)
        lines.append(" ".join(word for word in (layer, which, on.format, str(gradient)) if word))
    lines += ["batch norm folded in"] * len(gm.graph.find_nodes(op="call_function", target=FOLD_NORM))
    schedule = (f"{name} {getattr(how, name)}" for name in ("warmup", "observe", "rate", "freeze_norm"))
    return "\n".join([*sorted(lines), ", ".join(schedule)])


VERSION = 2
"""Of the text in a state. 1, the first, says neither its version nor a teacher, and is written still where
nobody teaches, so that what reads or writes tensors of one size finds those of before."""
_VERSION, _TEACHER = "version ", "teacher "


def as_bytes(trains: str, teacher: str = "") -> Tensor:
    """The extra state: what `trained_as` says, and the mark of a teacher. A tensor, since what gathers and
    writes state dicts expects tensors."""
    head = f"{_VERSION}{VERSION}\n{_TEACHER}{teacher}\n" if teacher else ""
    return torch.tensor(list(f"{head}{trains}".encode()), dtype=torch.uint8)


def check_trained_as(here: str, saved: Any, path: str, teacher: str = "") -> None:
    """Raises BitfoldError if the extra state of a module or program, if there is one, says something else, or
    speaks of another teacher than there is here. A state of a run without one, or a model without, is none of
    another: it may only be converted."""
    saved = saved.get("trains") if isinstance(saved, dict) else saved
    if not isinstance(saved, Tensor):
        return
    version, their_teacher, there = _read(bytes(saved.cpu().tolist()).decode(errors="replace"))
    layer = path.rstrip(".") or "(the model)"
    if version > VERSION:
        raise BitfoldError(
            f"the state of layer {layer} is of version {version}, and this bitfold reads up to {VERSION}; "
            "install the one that wrote it, or a later one"
        )
    if there != here:
        ours, theirs = Counter(here.split("\n")), Counter(there.split("\n"))
        raise BitfoldError(
            f"layer {layer} is prepared as {_short(ours - theirs)!r}, and the state was trained as "
            f"{_short(theirs - ours)!r}; give bf.prepare_qat the recipe and the options of that run"
        )
    if teacher and their_teacher and teacher != their_teacher:
        raise BitfoldError(
            "the state was trained with another teacher: the model that was given here, which would teach "
            "on, has other weights, or the same in another dtype, than the one which that run began with; "
            "give bf.prepare_qat that one, and call .to(dtype) where that run did, before or after; or, to "
            "convert only, give no distill"
        )


def _read(text: str) -> tuple[int, str, str]:
    """(version, teacher, what was trained) of an extra state."""
    first, _, rest = text.partition("\n")
    number = first.removeprefix(_VERSION)
    if not first.startswith(_VERSION) or not number.isdecimal():
        return 1, "", text
    teacher, _, trains = rest.partition("\n")
    return int(number), teacher.removeprefix(_TEACHER), trains


def _short(lines: Counter[str]) -> str:
    """The first two of the lines that only one of both has, as often as it has them more."""
    return "; ".join(sorted(lines.elements())[:2]) or "nothing beside what both have"
