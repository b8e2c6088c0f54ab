"""Pipelined schedules: which are worth trying for a number of rows of x, and which runs where nobody tuned.

In: a spec, rows of x, a device. Out: `Pipelined` values, the likeliest first, none where they cannot run.

    plans(spec, 128)                 ->   tma m128 n128 g2 w4 x3 j2 c3 p1 lane, the same streamk, ...
    untuned_plan(spec, 128, card)    ->   the first that leaves few programs idle; else tiles are shared

Found by measuring int4[g128] on one H200 (`docs/notes/pipelined.md`): below 64 rows kernels without a
pipeline of their own are faster, past 2048 decoding the weight first and the library's product.
"""

from __future__ import annotations

from dataclasses import replace

from .candidates import bucket
from .device import Device
from .pipelined import ARCH, Pipelined, lies, modes
from .spec import GemmSpec

FROM, UP_TO = 64, 2048
# For buckets of rows up to the key, each without the mode of its scale.
PLANS = {
    32: ("m32 n128 g2 w4 x3 j4 c4 p1", "m32 n64 g1 w4 x2 j4 c2 p4"),
    64: ("m64 n128 g2 w4 x4 j2 c4 p1", "m64 n64 g1 w4 x3 j2 c3 p2", "m64 n128 g1 w8 x3 j4 c3 p1"),
    128: ("m128 n128 g2 w4 x3 j2 c3 p1", "m128 n128 g2 w4 x6 j1 c4 p1", "m64 n128 g2 w4 x4 j2 c3 p1"),
    256: (
        "m256 n128 g1 w8 x4 j1 c2 p1", "m128 n128 g2 w4 x6 j1 c3 p1", "m256 n64 g1 w4 x4 j1 c2 p1",
        "m128 n64 g1 w4 x4 j1 c2 p2",
    ),
    1 << 30: ("m256 n128 g1 w8 x4 j1 c2 p1", "m128 n128 g2 w4 x6 j1 c3 p1", "m128 n128 g1 w8 x6 j1 c3 p1"),
}  # fmt: skip
# On activations in codes (`schedules-nvidia-h200-bytes.json`).
PLANS_OF_BYTES = {
    64: ("m64 n64 g1 w4 x4 j1 c4 p2", "m64 n128 g2 w4 x4 j1 c4 p1"),
    1 << 30: (
        "m128 n128 g2 w4 x4 j1 c4 p1", "m128 n128 g2 w4 x6 j1 c5 p1", "m128 n128 g1 w8 x4 j1 c4 p1",
        "m64 n128 g2 w4 x4 j1 c4 p1", "m64 n64 g1 w4 x4 j1 c4 p2",
    ),
}  # fmt: skip
# Of the places that its waves of programs have, a kernel of whole tiles fills this part at least.
FULL = 0.8
# Shared tiles gain where a program has 13 runs or more (4096 x 14336, 8192 x 8192), and lose with four
# (4096 x 4096): what they cost is a part of a tile each, through the memory.
RUNS = 8
# Past so many rows what would run else is the library, and scales in float32 were not timed against it.
UNMEASURED = 256


def plans(spec: GemmSpec, m: int) -> list[Pipelined]:
    """What can run the spec, for m rows of x."""
    known = PLANS if spec.activation is None else PLANS_OF_BYTES
    texts = next(texts for most, texts in known.items() if bucket(m) <= most)
    if not modes(spec) or not spec.walk:
        return []
    found = [
        Pipelined.parse(f"tma {text} {modes(spec)[0]}{tail}") for text in texts for tail in ("", " streamk")
    ]
    found = [replace(one, joined=min(one.joined, len(one.walk(spec).slices))) for one in found]
    return [one for one in dict.fromkeys(found) if one.obstacle(spec) is None]


def untuned_plan(spec: GemmSpec, m: int, card: Device) -> Pipelined | None:
    """What runs without a measurement; None if some other kind of kernel does."""
    if card.arch != ARCH or bucket(m) < FROM:
        return None
    found = plans(spec, m)
    if spec.activation is not None:
        return _of_bytes(spec, found, m, card)
    if bucket(m) > UP_TO:
        return None
    if not found or (found[0].scale == "float" and bucket(m) > UNMEASURED):
        return None
    whole = (one for one in found if not one.streamk and _filled(spec, one, m, card) >= FULL)
    shared = (one for one in found if one.streamk and one.groups == 2 and _runs(spec, one, m, card) >= RUNS)
    return next(whole, None) or next(shared, None)


def _of_bytes(spec: GemmSpec, found: list[Pipelined], m: int, card: Device) -> Pipelined | None:
    """On activations in codes. Scales of x's blocks want a tile half as wide; 64 rows of x are for pipelines
    only where plain kernels leave multiprocessors idle (4096 x 4096: int8 14.0 and 13.6 us, float8 11.7 and
    17.8; 28672 x 4096: 37.1 and 32.9, 34.2 and 33.7)."""
    if bucket(m) <= 64 and -(-spec.n // 128) >= card.multiprocessors and lies(spec):
        return None
    blocks = spec.activation is not None and spec.activation.cols is not None
    found = [one for one in found if not one.streamk and not (blocks and one.block_m > 64)]
    whole = (one for one in found if _filled(spec, one, m, card) >= FULL)
    return next(whole, None) or next(iter(reversed(found)), None)


def _runs(spec: GemmSpec, plan: Pipelined, m: int, card: Device) -> float:
    """Of each program, where tiles are shared."""
    tiles = -(-spec.n // plan.block_n) * -(-m // plan.block_m)
    return tiles * plan.walk(spec).runs / (card.multiprocessors * plan.programs)


def _filled(spec: GemmSpec, plan: Pipelined, m: int, card: Device) -> float:
    """Tiles, as a part of what the waves that they take have room for."""
    tiles = -(-spec.n // plan.block_n) * -(-m // plan.block_m)
    places = card.multiprocessors * plan.programs
    return tiles / (places * -(-tiles // places))
