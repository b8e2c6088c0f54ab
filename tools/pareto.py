"""Recipes against each other: bits for each weight, error of the result, time; and which of them no other
beats.

In: an `Inspection` a recipe. Out: `Point`s.

    points({"int8": found8, "int4": found4})   ->   (Point("int8", 8.1, 41.2, 3e-3, front=True), ...)

Bits count every weight of the model, those that stayed floats too, and other buffers. A recipe is on the
front if none has both fewer bits (or as many) and a smaller error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule

from .held import held_bytes, held_tensors
from .inspection import Inspection


@dataclass(frozen=True)
class Point:
    """bits: of a weight, on average; sqnr_db: signal to noise of the model's result; seconds: of all
    operators, None if they were not timed; front: whether no other recipe is better in both."""

    recipe: str
    bits: float
    sqnr_db: float
    seconds: float | None = None
    front: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "recipe": self.recipe,
            "bits": self.bits,
            "sqnr_db": self.sqnr_db,
            "seconds": self.seconds,
            "front": self.front,
        }


def point(name: str, found: Inspection) -> Point:
    """One recipe's."""
    seconds = [done.seconds for done in found.work.values() if done.seconds is not None]
    error = list(found.errors.values())[-1].sqnr_db if found.errors else math.nan
    bits = 8.0 * held_bytes(found.final) / max(1, _numbers(found.reference))
    return Point(name, bits, error, sum(seconds) if seconds else None)


def points(found: Mapping[str, Inspection]) -> tuple[Point, ...]:
    """All, by bits, those on the front marked. What has no error figure (an exact result) is left out of
    none."""
    return fronted([point(name, one) for name, one in found.items()])


def fronted(given: list[Point]) -> tuple[Point, ...]:
    """By bits, with `front` set."""
    marked = [
        replace(
            one,
            front=not any(
                other.bits <= one.bits
                and other.sqnr_db >= one.sqnr_db
                and (other.bits < one.bits or other.sqnr_db > one.sqnr_db)
                for other in given
            ),
        )
        for one in given
    ]
    return tuple(sorted(marked, key=lambda one: one.bits))


def _numbers(gm: GraphModule) -> int:
    held = {id(t): t.numel() for t in held_tensors(gm).values() if t.is_floating_point()}
    return sum(held.values())
