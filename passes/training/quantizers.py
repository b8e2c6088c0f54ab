"""Train quantizers: an annotated graph becomes one that trains, with chosen gradients and learned scales.

In: an annotated or observed graph. Out: a `bitfold.train_quantize` on each annotated edge, placed by
`fake_quantize` and of the same values, whose scales come from the data, from a range, or from parameters.

    %f = bitfold.fake_quantize(%w, "int4")
    ->  %f = bitfold.train_quantize(%w, "int4", "lsq", [%weight_step], False, None, 0)

    a calibrated activation, under observe=true:
    ->  bitfold.observe_range(%x, %input_seen_low, %input_seen_high, False)
        %f = bitfold.train_quantize(%x, "int8[tensor]", "clip", [%input_low, %input_high], False, %clock, 100)

Learned numbers are float32 parameters, ranges float32 buffers. `train_mode` sets the last-but-two argument;
`settle_quantizers` takes all of it back, so that `fold` can go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...formats import BitfoldError, Format, FormatError, format
from ...formats.gradient import Gradient
from ..algorithms.clip import Clip
from ..constants import add_constant, erase_dead_constants
from ..core import Pass, state
from ..edges import EDGE, Edge, edge
from ..edit import free_name
from ..note import annotated
from ..observing.observers import MinMax, Observer
from ..provenance import inherit
from ..stages import Stage, find_attribute
from .evaluated import attribute_of, evaluated
from .fake_quantize import FAKE_QUANTIZE, SEEN_BY, FakeQuantize

TRAIN_QUANTIZE = torch.ops.bitfold.train_quantize.default
OBSERVE_RANGE = torch.ops.bitfold.observe_range.default
RANGE = "bitfold_range"
"""In the meta of an `observe_range`: the names of the two ends that it moves."""
CLOCK = "clock"
"""The buffer that counts steps, in a graph whose quantizers follow a schedule."""


@dataclass(frozen=True)
class Range:
    """Names of buffers: the two ends of a range, and the extremes of what a step saw."""

    low: str
    high: str
    seen_low: str
    seen_high: str


@dataclass(frozen=True)
class TrainQuantizers(Pass):
    """weight, activation: their gradients; warmup: steps that train in floats; observe: ranges follow the
    data, so that a calibrated edge need not have seen any yet; ranged: nor now, ranges are known elsewhere;
    clip: learned scales of weights begin where rounding errs least, not where nothing is cut off."""

    name: ClassVar[str] = "train_quantizers"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.annotated, Stage.observed)
    produces: ClassVar[Stage | None] = Stage.fake_quantized

    weight: Gradient = field(default_factory=Gradient)
    activation: Gradient = field(default_factory=partial(Gradient, "clip"))
    warmup: int = 0
    observe: bool = False
    ranged: bool = False
    clip: bool = False

    def apply(self, gm: GraphModule) -> int:
        """Number of edges. Raises BitfoldError, with nothing written, for what cannot be trained so."""
        self._check(gm)
        self._let_unseen(gm)
        FakeQuantize().apply(gm)
        nodes = [node for node in gm.graph.nodes if node.target is FAKE_QUANTIZE]
        for node in nodes:
            self._rewrite(gm, node)
        erase_dead_constants(gm)
        state(gm).mutated = None  # observers write
        return len(nodes)

    def _check(self, gm: GraphModule) -> None:
        for _, note in annotated(gm):
            for which in ("weight", "input", "output"):
                text = getattr(note, which)
                gradient = self.weight if which == "weight" else self.activation
                if not text or (which != "weight" and not note.observer):
                    continue
                try:
                    gradient.check(format(text))
                except FormatError as error:
                    raise BitfoldError(f"the {which} of layer {note.layer}: {error}") from error

    def _let_unseen(self, gm: GraphModule) -> None:
        """Give an observer that saw nothing a range that stands for none, where that is allowed."""
        for node in gm.graph.find_nodes(op="call_module"):
            on, observer = edge(node), find_attribute(gm, str(node.target))
            if on is None or not isinstance(observer, Observer) or observer.seen:
                continue
            if self.ranged or (self.observe and not self.activation.learns):
                gm.add_submodule(str(node.target), _unseen(self.activation))

    def _rewrite(self, gm: GraphModule, node: Node) -> None:
        on, source = edge(node), node.args[0]
        assert on is not None and isinstance(source, Node)
        gradient = self.weight if on.which == "weight" else self.activation.of_item()
        fmt = format(on.format)
        held: list[Node] = []
        seen_by: Observer | None = node.meta.get(SEEN_BY)
        follows = False
        if on.which == "weight" and gradient.learns:
            with torch.no_grad():
                start = first_scales(fmt, read_now(gm, source), self.clip)
            held = _learned(gm, node, on, fmt, gradient, start)
        elif seen_by is not None:
            shape = [1] * source.meta["val"].ndim
            low, high = (end.reshape(shape).to(_device(node)) for end in seen_by.range())
            if gradient.learns:
                held = _learned(gm, node, on, fmt, gradient, fmt.from_range(low, high))
            else:
                held = [_hold(gm, node, on, "low", low), _hold(gm, node, on, "high", high)]
                follows = self.observe
        if follows:
            self._observe(gm, node, on, source, held)
        if gradient.learns and not held:
            gradient = gradient.without_scales()
        # What follows the data reads the clock too, without a step to wait for, so that the graph keeps it.
        counts = clock(gm, _device(node)) if self.warmup or follows else None
        args: Any = (source, on.format, str(gradient), held, False, counts, self.warmup)
        with gm.graph.inserting_before(node):
            new = gm.graph.create_node("call_function", TRAIN_QUANTIZE, args, name=f"{node.name}_trained")
        new.meta["val"], new.meta[EDGE] = node.meta["val"], on
        inherit(new, [node])
        node.replace_all_uses_with(new)
        fixed: Any = node.args[2] if len(node.args) > 2 else ()
        for old in (node, *(fixed or ())):  # scales that the pass fake_quantize made of the range
            gm.graph.erase_node(old)

    def _observe(self, gm: GraphModule, node: Node, on: Edge, source: Node, held: list[Node]) -> None:
        ends = [torch.full((), sign * torch.inf, device=_device(node)) for sign in (1, -1)]
        names = ("seen_low", "seen_high")
        seen = [_hold(gm, node, on, name, value) for name, value in zip(names, ends, strict=True)]
        with gm.graph.inserting_before(node):
            new = gm.graph.create_node("call_function", OBSERVE_RANGE, (source, *seen, False))
        inherit(new, [node])
        new.meta[RANGE] = tuple(str(end.target) for end in held)


def ranges(gm: GraphModule) -> tuple[Range, ...]:
    """The ranges that follow the data, in a graph that this pass has just rewritten."""
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=OBSERVE_RANGE):
        low, high = node.meta[RANGE]
        found.append(Range(low, high, *(str(seen.target) for seen in node.args[1:3])))
    return tuple(found)


def clock(gm: GraphModule, device: torch.device) -> Node:
    """The counter of steps, the first of the graph's nodes, so that all others can read it; made if new."""
    known: Node | None = next(
        (node for node in gm.graph.find_nodes(op="get_attr") if node.target == CLOCK), None
    )
    if known is not None:
        return known
    first = next(iter(gm.graph.nodes))
    return add_constant(gm, CLOCK, torch.zeros((), dtype=torch.int64, device=device), like=first)


def _unseen(gradient: Gradient) -> Observer:
    """An observer that lets a range be found later: empty, which takes each batch's own until then, or, where
    the numbers are learned and will be loaded, any."""
    made = MinMax()
    made.seen = 1
    if gradient.learns:
        made.low, made.high = torch.tensor(-1.0), torch.tensor(1.0)
    return made


def learned_start(fmt: Format, gradient: Gradient, numbers: Tensor, clip: bool) -> tuple[Tensor, ...]:
    """The learned numbers that a weight begins with, as `gradient` holds them."""
    with torch.no_grad():
        return gradient.estimator.begin(fmt, first_scales(fmt, numbers, clip))


def first_scales(fmt: Format, numbers: Tensor, clip: bool) -> tuple[Tensor, ...]:
    """The scales that learning begins with: those of the format's rule, or of the least square error."""
    if not clip:
        return fmt.choose(numbers)
    with torch.no_grad():
        return Clip(weighted=False).search(fmt, numbers.to(torch.float32))


def read_now(gm: GraphModule, source: Node) -> Tensor:
    """What a weight's quantizer reads now."""
    found = evaluated(source, attribute_of(gm))
    assert found is not None, f"{source.name} is no constant"
    return found.contiguous()  # type: ignore[no-any-return]


def _learned(
    gm: GraphModule, node: Node, on: Edge, fmt: Format, gradient: Gradient, start: tuple[Tensor, ...]
) -> list[Node]:
    learns = gradient.estimator
    parts = zip(learns.names(fmt), learns.begin(fmt, start), strict=True)
    return [_hold(gm, node, on, name, value, trains=True) for name, value in parts]


def _hold(gm: GraphModule, node: Node, on: Edge, part: str, value: Tensor, *, trains: bool = False) -> Node:
    """`value` as a parameter or a buffer of the graph's module, called after the layer and the operand."""
    layer = state(gm).local(on.layer)
    name = free_name(gm, "_".join(word for word in (layer, on.which, part) if word))
    made = add_constant(gm, name, value.detach().clone().to(torch.float32), like=node)
    if trains:
        numbers = gm._buffers.pop(str(made.target))
        assert numbers is not None
        gm.register_parameter(str(made.target), nn.Parameter(numbers))
    return made


def _device(node: Node) -> torch.device:
    return node.meta["val"].device  # type: ignore[no-any-return]
