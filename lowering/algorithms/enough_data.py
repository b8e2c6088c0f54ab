"""Whether there are tokens enough for the moments that an algorithm looks at: a warning, before long work.

In: for each layer, the tokens that calibration gives it and the channels that it reads. Out: nothing, or one
warning for all of them, which points at the line that called bitfold.

    warn_of_few([(20, 64), (20, 32)])    "calibration has 20 tokens for layers of up to 64 channels ..."

Fewer tokens than channels span less than the space, and rounding is then free in all that they do not.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator

from torch.fx import GraphModule, Node

from ...passes.algorithms.inputs import INPUTS
from ...passes.anchors import TARGETS
from .measure import linears


def warn_of_few(layers: Iterable[tuple[int, int]]) -> None:
    """`layers`: (tokens, channels) of each."""
    short = [(tokens, channels) for tokens, channels in layers if tokens < channels]
    if short:
        tokens, channels = min(one[0] for one in short), max(one[1] for one in short)
        warnings.warn(
            f"calibration has {tokens} tokens for layers of up to {channels} channels; give several times as "
            "many tokens as channels, or the codes will fit these tokens and little else",
            stacklevel=_outside(),
        )


def measured(gm: GraphModule) -> Iterator[tuple[int, int]]:
    """(tokens, channels) of the linears of a graph whose inputs were measured."""
    for node, _ in linears(gm):
        if INPUTS in node.meta:
            yield node.meta[INPUTS].count, len(node.meta[INPUTS].peak)


def expected(gm: GraphModule, tokens: int) -> Iterator[tuple[int, int]]:
    """The same of linears that are yet to be measured, if each sees that many tokens."""
    for node, _ in linears(gm):
        operand = node.args[TARGETS[node.target][2]]
        if isinstance(operand, Node):
            yield tokens, int(operand.meta["val"].shape[-1])


def _outside() -> int:
    """How many frames above `warn_of_few` the caller of bitfold is."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level


# torch's: decorators such as `no_grad` lie between.
_INSIDE = ("bitfold", "torch", "contextlib")
