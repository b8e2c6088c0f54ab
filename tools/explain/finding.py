"""A finding: one thing that is not as it could be, how much it matters, and what to try.

In: what a check saw. Out: findings, alike ones joined, the gravest first.

    [Finding(60, "saturated", "fc1", "..."), Finding(60, "saturated", "fc2", "...")]
    ->  [Finding(60, "saturated", "fc1 and 1 more", "...")]

Weights are points out of 100. Of two currencies one point is: of bytes or time, a hundredth of the model's;
of errors, a third of a decibel that the layer could have. A number that would be worse than useless (scales
of another weight, half of the values cut off) has 100."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

POINTS_A_DECIBEL = 3.0


@dataclass(frozen=True)
class Finding:
    """weight: points; kind: what sort, by which alike ones are joined; where: a module's path, or a node's
    name; what: the sentence, without the place; remedy: what to try; node: where to look in the page."""

    weight: float
    kind: str
    where: str
    what: str
    remedy: str
    node: str = ""
    places: int = 1

    def __str__(self) -> str:
        more = f" and {self.places - 1} more" if self.places > 1 else ""
        return f"{self.where or 'the model'}{more}: {self.what}"


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Findings of one kind with one remedy are one line, told by the gravest of them; the gravest line first.
    Where two kinds speak of one place, the one that gives the cause stands for the symptom."""
    found = list(findings)
    kinds: dict[str, set[str]] = {}
    for one in found:
        kinds.setdefault(one.where, set()).add(one.kind)
    kept = [one for one in found if not _explained(one.kind, kinds[one.where] - {one.kind})]
    groups: dict[tuple[str, str], list[Finding]] = {}
    for one in kept:
        groups.setdefault((one.kind, one.remedy), []).append(one)
    joined = []
    for same in groups.values():
        first = max(same, key=lambda one: one.weight)
        # What is summed up over the model (bytes, time) weighs as much as all of them.
        weight = sum(one.weight for one in same) if first.kind in SUMMED else first.weight
        joined.append(replace(first, weight=min(100.0, weight), places=sum(one.places for one in same)))
    return sorted(joined, key=lambda one: -one.weight)


SUMMED = ("skipped", "missed", "not fused", "not quantized")


def _explained(kind: str, others: set[str]) -> bool:
    """Whether another finding of the place is the cause: of an error, any; of a weight that is decoded, that
    no target runs the layer."""
    return bool(others) if kind == "own error" else kind == "decoded" and "on reference" in others
