"""Balancers applied to one block: factors chosen, weights and vectors changed, and the block shown to be the
same.

In: a block with what it is called with, its sites, and balancers (awq, smooth, equalize). Out: drafts of
scaled weights on the sites' anchors; new values for the parameters that take no codes; both in place in the
block for as long as its swaps last.

    input_layernorm / s;  q_proj, k_proj, v_proj columns * s          the block computes what it computed

Where a divided vector is rounded to its dtype, the columns are multiplied by the factor that this really was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ...formats import BitfoldError, Format, format
from ...passes import Miss, MissRecord, capture, expression
from ...passes.algorithms.balance import Balancer, Group, Weights, groups
from ...passes.algorithms.draft import DRAFT, Draft
from ...passes.algorithms.inputs import Inputs
from ...passes.anchors import TARGETS
from ...passes.note import Note, annotated
from ...passes.scopes.module import is_stock
from ...passes.scopes.program import CaptureError
from ..module_scope import Site
from ..swaps import Swaps
from ..turned import turned
from .blocks import Chain
from .calibration import hooked, in_order
from .described import described_module
from .measure import Gatherer

# Relative to the result's norm, over a chain of four products: float32 rounds 2^-24 at each of some thousand
# sums, and bfloat16 2^-9 at each tensor.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass
class Balance:
    """Applies `steps` to a chain's blocks. `shared`: identities of the parameters that something outside
    their group reads too (`used_once.py`); `changes`: new values of parameters that take no codes, by
    path."""

    steps: Sequence[Balancer]
    shared: frozenset[int] = frozenset()
    changes: dict[str, Tensor] = field(default_factory=dict)
    misses: list[MissRecord] = field(default_factory=list)
    known: dict[Hashable, list[Group] | Miss] = field(default_factory=dict)

    def apply(self, chain: Chain, place: int, sites: Sequence[Site], swaps: Swaps) -> None:
        """Balance block `place`. Raises BitfoldError if it then computes something else."""
        block, path = chain.blocks[place], chain.paths[place]
        found = self._groups(chain, place)
        if isinstance(found, Miss):
            self.misses.append(MissRecord(path, path, "", str(self.steps[0].name), found.reason))
            return
        if not found:
            reason = (
                "nothing in it can be balanced: no channels that linears read are made by a plain vector or "
                "the rows of a linear"
            )
            self.misses.append(MissRecord(path, path, "", str(self.steps[0].name), reason))
        found = [group for group in found if self._alone(group, block, path)]
        work = _Work(block, path, sites, swaps)
        found = [group for group in found if self._free(group, work) and self._seen(group, work)]
        before = chain.run(place, 0)
        for step in self.steps:
            inputs = _inputs(chain, place, found, work) if step.needs_inputs else {}
            for group in found:
                factors = step.factors(work.weights(group, inputs.get(group.readers[0])))
                if factors is not None:
                    work.scale(group, factors)
        after = chain.run(place, 0)
        apart = float((after - before).float().norm() / before.float().norm().clamp(min=1e-12))
        if not apart <= TOLERANCE.get(before.dtype, 1e-2):  # NaN, of a weight past its dtype's range, neither
            raise BitfoldError(
                f"{path} computes something else after balancing (by {apart:.1e}): its channels are mixed "
                f"in a way that is not seen; leave {self.steps[0].name} out for this model"
            )
        self.changes |= work.changes

    def _alone(self, group: Group, block: nn.Module, path: str) -> bool:
        """Whether nothing but this group reads its parameters; a miss says which one has another reader."""
        names = (*(one.path for one in group.producers), *group.readers)
        for name in names:
            if id(block.get_parameter(name)) in self.shared:
                reason = (
                    f"{path}.{name} is used in more than one place, so {group.readers[0]} is not balanced"
                )
                self.misses.append(MissRecord(path, path, "", str(self.steps[0].name), reason))
                return False
        return True

    def _free(self, group: Group, work: _Work) -> bool:
        """Whether none of its parameters has codes of its own already, which no factor changes."""
        for name in (*(one.path for one in group.producers), *group.readers):
            if name in work.anchors and work.anchors[name][2].stored:
                reason = f"{work.path}.{name} has codes of its own (stored), so its channels stay as they are"
                self.misses.append(MissRecord(work.path, work.path, "", str(self.steps[0].name), reason))
                return False
        return True

    def _seen(self, group: Group, work: _Work) -> bool:
        """Whether it can be measured what goes into its readers, if a step wants to know."""
        name = group.readers[0]
        if work.watched(name) or not any(step.needs_inputs for step in self.steps):
            return True
        reason = f"{work.path}.{name} is multiplied inside a module of its own forward, which takes no codes"
        self.misses.append(MissRecord(work.path, work.path, "", str(self.steps[0].name), reason))
        return False

    def _groups(self, chain: Chain, place: int) -> list[Group] | Miss:
        """The block's groups; blocks that hold the same but for their numbers are captured once."""
        block = chain.blocks[place]
        modules = tuple((name, described_module(module)) for name, module in block.named_modules())
        key = (modules, tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
        if key not in self.known:
            args, kwargs = chain.arguments(place)
            try:
                self.known[key] = groups(capture(block, args, kwargs=kwargs))
            except CaptureError as error:
                self.known[key] = Miss(f"cannot be balanced: {error}")
        return self.known[key]


class _Work:
    """The parameters of one block, by their path in it, while they are changed."""

    def __init__(self, block: nn.Module, path: str, sites: Sequence[Site], swaps: Swaps) -> None:
        self.block, self.path, self.swaps = block, path, swaps
        self.changes: dict[str, Tensor] = {}
        self.anchors: dict[str, tuple[Site, Node, Note]] = {}
        for site in sites:
            for node, note in annotated(site.gm):
                operand = node.args[TARGETS[node.target][2]]
                chain = expression(site.gm, operand) if isinstance(operand, Node) else None
                if chain is not None and not chain.text and note.anchor == "linear" and note.weight:
                    self.anchors[chain.path.removeprefix(path).strip(".")] = (site, node, note)

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
            self.changes[f"{self.path}.{name}"] = value.to(held.dtype)
        self.swaps.replace(owner, own, value.to(held.dtype))


def _inputs(chain: Chain, place: int, found: Sequence[Group], work: _Work) -> dict[str, Inputs]:
    """Statistics of what each group reads, by its first reader's path."""
    block = chain.blocks[place]
    seen: dict[str, Inputs] = {}

    def add(name: str, x: Tensor) -> None:
        if name not in seen:
            seen[name] = Inputs(x.shape[-1], x.device)
        seen[name].add(x)

    with contextlib.ExitStack() as hooks:
        for group in found:
            module, hook = work.watch(group.readers[0], add)
            hooks.enter_context(hooked(block, {module: hook}))
        for batch in range(len(chain.hidden)):
            chain.run(place, batch)
    return seen
