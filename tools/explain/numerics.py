"""Checks of numbers: values that are none, scales that are shared by mistake, activations cut off, layers
that err more than their like.

In: an `Inspection`. Out: findings.

    a weight in int8[tensor] whose rows differ 1 : 300
    ->  "one scale for the whole weight, whose largest row is 300 times the middle one: 18 dB, and 41 dB with
    a ..."
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from ..inspection import Inspection
from .finding import POINTS_A_DECIBEL, Finding

# Decibels that a finer scale must gain to be worth a line: one bit.
WORTH_DB = 6.0
# Share of an activation's values beyond its codes from which on it is told: rounding to the range's
# percentile, as `percentile` observers do on purpose, leaves 0.1 %.
CLIPPED = 0.002


def no_numbers(found: Inspection) -> Iterator[Finding]:
    """The first value that cannot be compared, since it is no number on one side; what is behind it has none
    to compare either."""
    for name, error in found.errors.items():
        if not math.isnan(error.sqnr_db):
            continue
        if error.numbers:
            what = "its value has infinities or NaN, where the unquantized model has numbers"
            remedy = "a finer format for it and for what is in front of it, or a wider dtype"
        else:
            what = "its value has infinities or NaN in the unquantized model too: errors behind it are hidden"
            remedy = "inputs for which the unquantized model gives numbers"
        yield Finding(100.0, "no number", _module(found, name), what, remedy, name)
        return


def shared_scales(found: Inspection) -> Iterator[Finding]:
    """Scales of another weight; one scale for rows that differ."""
    for stats in found.weights.values():
        if stats.shares_scales:
            other = found.weights[stats.shares_scales]
            yield Finding(
                100.0,
                "scale shared",
                stats.layer,
                f"its weight is decoded with the scales of {other.layer or other.name} "
                f"({_db(stats.sqnr_db)} signal to noise, {_db(other.sqnr_db)} there)",
                "give each weight scales of its own: fold it from the float weight again",
                stats.name,
            )
        gain = stats.row_sqnr_db - stats.sqnr_db
        if math.isfinite(gain) and gain >= WORTH_DB:
            yield Finding(
                POINTS_A_DECIBEL * gain,
                "scale shared",
                stats.layer,
                f"one scale for the whole weight ({stats.format}), whose largest row is "
                f"{stats.spread:.0f} times the middle one: {_db(stats.sqnr_db)} signal to noise, "
                f"{_db(stats.row_sqnr_db)} with a scale a row",
                f"{stats.format.replace('[tensor]', '[row]')} for it",
                stats.name,
            )


def saturated(found: Inspection) -> Iterator[Finding]:
    """Activations with values beyond what their scale reaches."""
    for name, flow in found.flows.items():
        if flow.clipped is None or flow.clipped < CLIPPED:
            continue
        # The tenth part of a percent is the limit; each factor of ten beyond it is worth a third of all
        # points.
        weight = min(100.0, 40.0 + 30.0 * math.log10(flow.clipped / CLIPPED))
        yield Finding(
            weight,
            "saturated",
            _module(found, name),
            f"{100 * flow.clipped:.1f} % of the values of its input lie beyond the scale of {flow.format} "
            f"and are cut off ({_db(flow.sqnr_db)} signal to noise); values go from {flow.values.low:.3g} to "
            f"{flow.values.high:.3g}",
            "calibrate on data like what the model will see, or choose scales anew (int8_dynamic)",
            name,
        )


def own_errors(found: Inspection) -> Iterator[Finding]:
    """Layers that err by themselves far more than the others of their format."""
    by_format: dict[str, list[tuple[str, str, float]]] = {}
    for node, module, text, own in layers(found):
        by_format.setdefault(text, []).append((node, module, own))
    for text, rows in by_format.items():
        if len(rows) < 3:
            continue
        middle = median(own for _, _, own in rows)
        for node, module, own in rows:
            if middle - own < WORTH_DB:
                continue
            yield Finding(
                POINTS_A_DECIBEL * (middle - own),
                "own error",
                module,
                f"by itself it errs {middle - own:.0f} dB more than the others in {text} "
                f"({_db(own)}, the middle is {_db(middle)})",
                "a finer scale or more bits for it, by a rule of its own",
                node,
            )


def layers(found: Inspection) -> Iterator[tuple[str, str, str, float]]:
    """(node, module, formats, own error) of each quantized layer whose error is known."""
    for node in found.trace.steps[_annotated(found)].snapshot:
        if not node.note:
            continue
        error = found.errors.get(node.name)
        if error is not None and math.isfinite(error.isolated_db):
            yield node.name, node.module_path, node.note, error.isolated_db


def _annotated(found: Inspection) -> int:
    """The first step that has notes; the last if none has."""
    for i, step in enumerate(found.trace.steps):
        if any(node.note for node in step.snapshot):
            return i
    return len(found.trace.steps) - 1


def _module(found: Inspection, name: str) -> str:
    for step in found.trace.steps:
        for node in step.snapshot:
            if node.name == name:
                return node.module_path
    return name


def _db(value: float) -> str:
    return "exact" if value == math.inf else "unknown" if math.isnan(value) else f"{value:.0f} dB"
