"""The errors of use that every layer raises, and the "did you mean" that goes with an unknown name.

In: what the user gave and what is allowed. Out: one clear sentence.

    format("int44")  ->  FormatError: unknown format 'int44'; did you mean 'int4'?
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BitfoldError(ValueError):
    """An error of use: the message is one sentence that says what was given, what is allowed, what to do."""


class FormatError(BitfoldError):
    """A format that does not exist, contradicts itself, or cannot take the tensor it was given."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown name" sentence: the two closest known names, in whatever case, or nothing."""
    by_lower = {known_name.lower(): known_name for known_name in sorted(set(known))}
    close = [by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, n=2, cutoff=0.6)]
    if not close:
        return ""
    return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
