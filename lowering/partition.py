"""Which target takes which region of a fused graph.

In: a fused graph and targets in order of preference. Out: for each outlined region the first target that
takes it, and for what none takes the reasons of all.

    fused_fc1 (int8), fused_conv (int8); targets: mine (linears only), cpu
    ->  {fused_fc1: mine, fused_conv: cpu}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from ..passes import Miss
from ..passes.fuse import region_of
from .target import Target


@dataclass
class Partition:
    """`taken`: calls of regions and who takes them, in graph order; `left`: those left over, and why."""

    taken: dict[Node, Target] = field(default_factory=dict)
    left: dict[Node, Miss] = field(default_factory=dict)


def partition(gm: GraphModule, targets: Sequence[Target]) -> Partition:
    """Assign every outlined region of `gm`; nothing is changed."""
    found = Partition()
    for node in gm.graph.nodes:
        region = region_of(gm, node)
        if region is None:
            continue
        reasons = []
        for target in targets:
            answer = target.supports(region)
            if answer:
                found.taken[node] = target
                break
            reasons.append(f"{target.name}: {answer.reason if isinstance(answer, Miss) else 'not taken'}")
        else:
            found.left[node] = Miss("; ".join(reasons))
    return found
