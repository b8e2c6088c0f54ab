"""A balancer applied to one block: factors chosen, weights and vectors changed, and the block shown to be the
same.

In: a block with what it is called with, its sites, and a balancer (awq, smooth, equalize). Out: drafts of
scaled weights on the sites' anchors; new values for the parameters that take no codes; both in place in the
block for as long as its swaps last.

    input_layernorm / s;  q_proj, k_proj, v_proj columns * s          the block computes what it computed

Where a divided vector is rounded to its dtype, the columns are multiplied by the factor that this really was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ...formats import BitfoldError, Format, format
from ...passes import Miss, capture, expression
from ...passes.algorithms.balance import Balancer, Group, Weights, groups
from ...passes.algorithms.draft import DRAFT, Draft
from ...passes.algorithms.inputs import Inputs
from ...passes.anchors import TARGETS
from ...passes.core import below
from ...passes.note import Note, annotated
from ...passes.scopes.module import is_stock
from ...passes.scopes.program import CaptureError
from ..module_scope import Site
from ..turned import turned
from .at_rest import hooked, in_order
from .blocks import Chain
from .described import described_module
from .measure import Gatherer
from .places import Block, work

# Relative to the result's norm, over a chain of four products: float32 rounds 2^-24 at each of some thousand
# sums, and bfloat16 2^-9 at each tensor.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@work.register
def balance_block(step: Balancer, at: Block) -> None:
    """Balance a block. Raises BitfoldError if it then computes something else."""
    found = _groups(at)
    if isinstance(found, Miss):
        at.whole.miss(at.path, step.name, found.reason)
        return
    if not found:
        reason = (
            "nothing in it can be balanced: no channels that linears read are made by a plain vector or the "
            "rows of a linear"
        )
        at.whole.miss(at.path, step.name, reason)
    now = _Parameters(at)
    found = [group for group in found if _may_be_scaled(step, group, now)]
    before = at.chain.run(at.place, 0)
    inputs = _inputs(at.chain, at.place, found, now) if step.needs_inputs else {}
    for group in found:
        factors = step.factors(now.weights(group, inputs.get(group.readers[0])))
        if factors is not None:
            now.scale(group, factors)
    after = at.chain.run(at.place, 0)
    apart = float((after - before).float().norm() / before.float().norm().clamp(min=1e-12))
    if not apart <= TOLERANCE.get(before.dtype, 1e-2):  # NaN, of a weight past its dtype's range, neither
        raise BitfoldError(
            f"{at.path} computes something else after balancing (by {apart:.1e}): its channels are mixed in "
            f"a way that is not seen; leave {step.name} out for this model"
        )
    at.whole.changes |= now.changes


def _may_be_scaled(step: Balancer, group: Group, now: _Parameters) -> bool:
    """Whether nothing but this group reads its parameters, none has codes of its own already, which no factor
    changes, and it can be measured what goes into its readers if the step wants to know; else a miss."""
    whole, path = now.at.whole, now.at.path
    names = (*(one.path for one in group.producers), *group.readers)
    reader = group.readers[0]
    for name in names:
        if id(now.at.module.get_parameter(name)) in whole.shared:
            reason = f"{path}.{name} is used in more than one place, so {reader} is not balanced"
            whole.miss(path, step.name, reason)
            return False
    for name in names:
        if name in now.anchors and now.anchors[name][2].stored:
            reason = f"{path}.{name} has codes of its own (stored), so its channels stay as they are"
            whole.miss(path, step.name, reason)
            return False
    if step.needs_inputs and not now.watched(reader):
        reason = f"{path}.{reader} is multiplied inside a module of its own forward, which takes no codes"
        whole.miss(path, step.name, reason)
        return False
    return True


def _groups(at: Block) -> list[Group] | Miss:
    """The block's groups; blocks that hold the same but for their numbers are captured once."""
    modules = tuple((name, described_module(module)) for name, module in at.module.named_modules())
    parameters = tuple((name, tuple(p.shape)) for name, p in at.module.named_parameters())
    key = ("groups", modules, parameters)
    if key not in at.whole.kept:
        args, kwargs = at.chain.arguments(at.place)
        try:
            at.whole.kept[key] = groups(capture(at.module, args, kwargs=kwargs))
        except CaptureError as error:
            at.whole.kept[key] = Miss(f"cannot be balanced: {error}")
    known: list[Group] | Miss = at.whole.kept[key]
    return known


class _Parameters:
    """The parameters of one block, by their path in it, while they are changed."""

    def __init__(self, at: Block) -> None:
        self.at, self.block = at, at.module
        self.changes: dict[str, Tensor] = {}
        self.anchors: dict[str, tuple[Site, Node, Note]] = {}
        for site in at.sites:
            for node, note in annotated(site.gm):
                operand = node.args[TARGETS[node.target][2]]
                chain = expression(site.gm, operand) if isinstance(operand, Node) else None
                if chain is not None and not chain.text and note.anchor == "linear" and note.weight:
                    self.anchors[below(chain.path, at.path)] = (site, node, note)

    def weights(self, group: Group, inputs: Inputs | None) -> Weights:
        readers: list[tuple[Tensor, Format | None]] = []
        for name in group.readers:
            anchor = self.anchors.get(name)
            fmt = format(anchor[2].weight) if anchor is not None and anchor[2].weight else None
            readers.append((self.value(name), fmt))
        rows = [self.value(one.path) for one in group.producers if one.kind == "rows"]
        return Weights(group, readers, rows, inputs)

    def watched(self, name: str) -> bool:
        """Whether it can be seen what the reader of this parameter is given: a linear, or one in a graph."""
        return name in self.anchors or is_stock(self._owner(name))

    def watch(self, name: str, add: Callable[[str, Tensor], None]) -> tuple[nn.Module, Callable[..., None]]:
        """The module that reads a parameter, and a hook that notes what the linear in it is given."""
        owner = self._owner(name)

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = in_order(module, args, kwargs)
            if is_stock(module):
                add(name, given[0])
                return
            site, node, _ = self.anchors[name]
            Gatherer(site.gm, [node], site.path, lambda path, anchor, x: add(name, x), module).run(*given)

        return owner, hook

    def _owner(self, name: str) -> nn.Module:
        return self.block.get_submodule(name.rpartition(".")[0])

    def value(self, name: str) -> Tensor:
        """The parameter as it is now, float32."""
        if name in self.anchors:
            node = self.anchors[name][1]
            draft = node.meta.get(DRAFT)
            if isinstance(draft, Draft):
                # Channels are those before the transform, if there is one.
                return torch.ops.bitfold.hadamard(draft.weight, True) if turned(node) else draft.weight
        return self.block.get_parameter(name).detach().float()

    def scale(self, group: Group, factors: Tensor) -> None:
        """Producers divided, readers' columns multiplied."""
        real = factors
        for one in group.producers:
            value = self.value(one.path)
            by = factors[:, None] if one.kind == "rows" else factors
            self.put(one.path, value / by)
            if one.kind == "vector" and len(group.producers) == 1:
                # What is stored is rounded; the readers make up for what it became.
                stored = self.block.get_parameter(one.path).detach().float()
                real = torch.where(stored == 0, factors, value / torch.where(stored == 0, 1.0, stored))
        for name in group.readers:
            self.put(name, self.value(name) * group.spread(real))

    def put(self, name: str, value: Tensor) -> None:
        """A new value for a parameter: a draft if it takes codes, else a change; in the block meanwhile."""
        prefix, _, own = name.rpartition(".")
        owner = self.block.get_submodule(prefix)
        held = owner.get_parameter(own)
        if name in self.anchors:
            node = self.anchors[name][1]
            node.meta[DRAFT] = Draft(torch.ops.bitfold.hadamard(value) if turned(node) else value)
        else:
            self.changes[f"{self.at.path}.{name}"] = value.to(held.dtype)
        self.at.swaps.replace(owner, own, value.to(held.dtype))


def _inputs(chain: Chain, place: int, found: Sequence[Group], now: _Parameters) -> dict[str, Inputs]:
    """Statistics of what each group reads, by its first reader's path."""
    block = chain.blocks[place]
    seen: dict[str, Inputs] = {}

    def add(name: str, x: Tensor) -> None:
        if name not in seen:
            seen[name] = Inputs(x.shape[-1], x.device)
        seen[name].add(x)

    with contextlib.ExitStack() as hooks:
        for group in found:
            module, hook = now.watch(group.readers[0], add)
            hooks.enter_context(hooked(block, {module: hook}))
        for batch in range(len(chain.hidden)):
            chain.run(place, batch)
    return seen
