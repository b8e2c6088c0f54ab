"""What was prepared, and how: of a module, and of a program.

In: nothing; this is data. Out: what `bf.advance` and `bf.convert` go by.

    model.fc.preparation        ->  Preparation("fc", "int4[g32]", Qat("lsq"), ..)
    gm.meta[PROGRAM]            ->  PreparedProgram(Qat("lsq"), extra=("fc_weight_step",), ..)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from ...passes.training.quantizers import Range
from .options import Qat


@dataclass(frozen=True)
class Preparation:
    """What `bf.convert` needs to make the module's graph again: where it was in the model, by which recipe
    and options it was prepared, whether it is a head for being tied to an embedding, and what it is called
    with (shape, dtype of each argument) if that is not known from its kind. `folded_away`: it is a batch norm
    that the convolution before it computes. `freezes`: it is one that nothing folds, whose statistics stand
    still from a step on. `trains`: its numbers as `trained_as` says them. `ranges`: those that follow the
    data, by the names of their buffers. `teacher`: the mark of the model's (`distill.py`), or "".
    """

    path: str
    recipe: str
    options: Qat
    tied_head: bool = False
    call: tuple[tuple[tuple[int, ...], torch.dtype], ...] | None = None
    folded_away: bool = False
    freezes: bool = False
    trains: str = ""
    ranges: tuple[Range, ...] = ()
    teacher: str = ""


PROGRAM = "bitfold_qat"
"""In the meta of a prepared program: its `PreparedProgram`."""


@dataclass(frozen=True)
class PreparedProgram:
    """options; extra: the names of what training added; ranges: those that follow the data; caches: the
    recipe of its KV caches, or ""; trains: its numbers as `trained_as` says them."""

    options: Qat
    extra: tuple[str, ...] = ()
    ranges: tuple[Range, ...] = ()
    caches: str = ""
    trains: str = ""


def program_of(gm: GraphModule) -> PreparedProgram:
    """How a graph was prepared, that is a prepared program."""
    found = gm.meta[PROGRAM]
    assert isinstance(found, PreparedProgram)
    return found
