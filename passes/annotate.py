"""Annotate: write on every anchor which format each of its edges takes, and by which rule.

In: a captured graph and a recipe. Out: the same graph with a `Note` at `node.meta["bitfold"]` of each
anchor that the recipe means. Everything that could fail later is checked here, before the first note is
written.

    %y = aten.linear(%x, %w)    ->    %y = aten.linear(%x, %w)    # int4[g128] weight
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from ..formats import BitfoldError, Format, FormatError, format, nearest
from .anchors import BATCHED, Anchor, anchors, fixed_size, identity, untaken
from .core import Miss, MissRecord, Pass, report, state
from .joints import plan_joints, sites, write_joints
from .note import KEY, Note
from .recipes import Recipe
from .rules import STORED, Rule, Site
from .stages import Stage

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Annotate(Pass):
    """recipe: a recipe's name, a format's text, or JSON; a `Recipe` given from Python is kept as its text.
    heads: paths, separated by spaces, of linears tied to an embedding that this graph does not show."""

    name: ClassVar[str] = "annotate"
    requires: ClassVar[Stage | None] = Stage.captured
    produces: ClassVar[Stage | None] = Stage.annotated

    recipe: str = "int8"
    heads: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", str(Recipe.parse(self.recipe)))

    def apply(self, gm: GraphModule) -> int:
        """Number of anchors annotated. Raises BitfoldError, before writing, if a layer cannot comply."""
        recipe = Recipe.parse(self.recipe)
        plan = _Plan(gm)
        found = anchors(gm, self.heads.split())
        for anchor in found:
            rule = recipe.rule(anchor.site)
            if rule is not None:
                plan.consider(anchor, rule)
        plan.check_sharing()
        joints = plan_joints(gm, recipe)
        plan.write()
        joined = write_joints(gm, joints)
        _report_untaken(gm, recipe)
        if state(gm).scope == "program":
            known = [*(anchor.site for anchor in found), *(site for _, site in sites(gm))]
            _report_unmatched(gm, recipe, known)
        return len(plan.notes) + joined


class _Plan:
    """What will be written, gathered first so that an error leaves the graph as it was."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.notes: list[tuple[Anchor, Note]] = []
        self.misses: list[tuple[Node, Miss, str]] = []
        self.ends: dict[Hashable, tuple[float, float]] = {}

    def consider(self, anchor: Anchor, rule: Rule) -> None:
        if rule.skip:
            return self.miss(anchor, rule, rule.skip)
        try:
            note = self.note(anchor, rule)
            if note.weight and not note.stored:
                self.check_numbers(anchor, format(note.weight))
        except _Misfit as misfit:
            if rule.on_misfit == "error":
                raise BitfoldError(f"layer {anchor.layer}: {misfit}") from misfit
            return self.miss(anchor, rule, str(misfit))
        if note.weight or note.input or note.output:
            self.notes.append((anchor, note))
        return None

    def note(self, anchor: Anchor, rule: Rule) -> Note:
        weight, stored = rule.weight, ""
        came = _stored(self.gm, anchor)
        if rule.weight == STORED and came is None:
            self.miss(anchor, rule, "the checkpoint has no codes for this weight")
            weight = ""
        if came is not None and rule.weight in (STORED, came[1]):
            stored, weight = came
        if weight and not stored:
            _check_weight(anchor, format(weight))
        return Note(
            layer=anchor.layer,
            anchor=anchor.kind,
            rule=str(rule),
            weight=weight or None,
            input=self.activation(anchor, rule, "input"),
            output=self.activation(anchor, rule, "output"),
            observer=rule.observer or None,
            stored=stored,
        )

    def activation(self, anchor: Anchor, rule: Rule, edge: str) -> str | None:
        """The format of the input or the output, if this anchor has such an edge."""
        text = rule.input if edge == "input" else rule.output
        if not text:
            return None
        if anchor.kind == "embedding" and edge == "input":
            self.miss(anchor, rule, "the input of an embedding is indices, which take no format")
            return None
        value = (anchor.input if edge == "input" else anchor.node).meta["val"]
        _check_activation(anchor, format(text), value, edge, observed=bool(rule.observer))
        return text

    def check_numbers(self, anchor: Anchor, fmt: Format) -> None:
        tensor, key = anchor.tensor, identity(anchor.tensor)
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            raise _Misfit(
                "its weight is on the meta device and has no numbers; load the weights before quantizing"
            )
        if not tensor.numel():
            return
        if key not in self.ends:
            self.ends[key] = _ends(tensor)
        low, high = self.ends[key]
        if not (math.isfinite(low) and math.isfinite(high)):
            raise _Misfit(
                "its weight has NaN or infinity in it; repair it, or leave the layer out by a skip rule"
            )
        if not fmt.holds(low, high, tensor.dtype):
            raise _Misfit(
                f"its weight goes from {low:.3g} to {high:.3g}, further than the scales of {fmt} reach; "
                "take a format with wider scales, or leave the layer out by a skip rule"
            )

    def check_sharing(self) -> None:
        """Tied weights in one format are stored once; in two formats, twice, and that is said."""
        formats: dict[Hashable, tuple[str, str]] = {}
        for anchor, note in self.notes:
            if not note.weight:
                continue
            layer, text = formats.setdefault(identity(anchor.tensor), (note.layer, note.weight))
            if text != note.weight:
                reason = f"the weight is tied to {layer}, which takes {text}, so it is stored in both formats"
                self.misses.append((anchor.node, Miss(reason), f"weight {note.weight}"))

    def miss(self, anchor: Anchor, rule: Rule, reason: str) -> None:
        self.misses.append((anchor.node, Miss(reason), str(rule)))

    def write(self) -> None:
        for anchor, note in self.notes:
            anchor.node.meta[KEY] = note
        for node, miss, asked in self.misses:
            report(self.gm, node, miss, asked)


class _Misfit(BitfoldError):
    """A layer cannot take what its rule says."""


def _ends(tensor: Tensor) -> tuple[float, float]:
    # aminmax reads the weight once and carries NaN and infinity through; isfinite would write a mask.
    low, high = torch.aminmax(tensor.detach())
    return float(low), float(high)


def _stored(gm: GraphModule, anchor: Anchor) -> tuple[str, str] | None:
    """Where the user's own codes for this weight are kept, and their format; None if there are none."""
    known = state(gm).stored
    paths = (anchor.source.path, *(f"{path}.weight" for path in anchor.paths))
    path = next((path for path in paths if path in known), None)
    if path is None or anchor.kind in BATCHED or anchor.source.text:
        return None
    if tuple(known[path].shape) != anchor.shape:
        given, wanted = list(known[path].shape), list(anchor.shape)
        raise BitfoldError(
            f"layer {anchor.layer}: the codes given for it have shape {given}, its weight {wanted}"
        )
    return path, str(known[path].format)


def _check_weight(anchor: Anchor, fmt: Format) -> None:
    dtype = anchor.tensor.dtype
    if dtype not in FLOATS:
        raise _Misfit(f"its weight is {dtype}, and only {', '.join(str(d) for d in FLOATS)} can be quantized")
    try:
        fmt.check(anchor.shape)
    except FormatError as error:
        raise _Misfit(f"its weight of shape {list(anchor.shape)} cannot take {fmt}: {error}") from error


def _check_activation(anchor: Anchor, fmt: Format, value: Tensor, edge: str, *, observed: bool) -> None:
    per_tensor = fmt.scale is None or (
        fmt.scale.granularity.rows is None and fmt.scale.granularity.cols is None
    )
    if not value.dtype.is_floating_point:
        raise _Misfit(f"its {edge} is {value.dtype}, which takes no format")
    if observed and not per_tensor:
        raise _Misfit(
            f"a calibrated {edge} takes one scale a tensor, not {fmt}; write {fmt.element.name}[tensor]"
        )
    if anchor.kind.startswith("conv") and not per_tensor:
        # Channels are not the last dimension here, so a row would be one line of an image.
        raise _Misfit(
            f"a convolution's {edge} takes one scale a tensor, not {fmt}; write {fmt.element.name}[tensor]"
        )
    if per_tensor:
        return
    k = fixed_size(value.shape[-1])
    if k is None:
        raise _Misfit(f"its {edge} has a last dimension that varies, not for {fmt}; use a [tensor] format")
    try:
        fmt.check((1, k))
    except FormatError as error:
        raise _Misfit(f"its {edge} with a last dimension of {k} cannot take {fmt}: {error}") from error


def _report_untaken(gm: GraphModule, recipe: Recipe) -> None:
    """Layers that a rule means and that no anchor describes."""
    for node, site, miss in untaken(gm):
        rule = recipe.rule(site)
        if rule is not None and not rule.skip:
            report(gm, node, miss, str(rule))


def _report_unmatched(gm: GraphModule, recipe: Recipe, sites: list[Site]) -> None:
    """Rules that name a layer which the whole model does not have: a slip of the pen."""
    for rule in recipe.unmatched(sites):
        hint = nearest(rule.match, [path for site in sites for path in site.paths])
        reason = f"no layer matches this rule{hint}"
        state(gm).misses.append(MissRecord("", "", "", str(rule), reason))
