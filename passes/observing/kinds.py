"""Observers by name: the built-in ones, those registered by a program, and those of installed packages.

In: text, as a rule of a recipe has it. Out: a new observer.

    observer("percentile:99.99")         a Percentile of that share
    register_observer("mine", Mine)      a rule may say observer="mine" then; "mine:3" if it takes a number

A package offers its observers by the entry-point group `bitfold.observers` (name -> class), looked at when a
name is not known otherwise.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from ...formats import BitfoldError, nearest
from .histograms import Entropy, LeastSquares, Percentile
from .observers import Average, MinMax, Moving, Observer

GROUP = "bitfold.observers"

_BUILT_IN: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "average": Average,
    "moving": Moving,
    "percentile": Percentile,
    "mse": LeastSquares,
    "entropy": Entropy,
}

# The one thing here that changes: what a program registers while it runs.
_registered: dict[str, type[Observer]] = {}


def register_observer(name: str, kind: type[Observer]) -> None:
    """`name` in a rule's `observer` stands for `kind`, made without arguments; with one, if it says what its
    `number` is. Raises BitfoldError for a name that is taken by another, or that would not parse."""
    if not (isinstance(name, str) and name.isidentifier()):
        raise BitfoldError(f"an observer's name is a word of letters, digits and _, not {name!r}")
    if not (isinstance(kind, type) and issubclass(kind, Observer)):
        raise BitfoldError(f"the observer {name} is to be a subclass of Observer, not {kind!r}")
    known = (_BUILT_IN | _registered).get(name)
    # A class that a notebook defines anew is another object; one of the library's own is never replaced.
    again = known is kind or (name not in _BUILT_IN and known is not None and _full(known) == _full(kind))
    if known is not None and not again:
        raise BitfoldError(f"the observer {name} is {known.__name__} already; take another name")
    _registered[name] = kind


def _full(kind: type[Observer]) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def observer_names() -> list[str]:
    """Every name that `observer` knows: the built-in ones first."""
    offered = (point.name for point in entry_points(group=GROUP))
    return [*_BUILT_IN, *sorted({*_registered, *offered} - {*_BUILT_IN})]


def observer(text: str) -> Observer:
    """The observer that `text` names. Raises BitfoldError with the nearest names for an unknown one."""
    name, _, option = text.partition(":")
    kind = _kind(name)
    if not option:
        return kind()
    if not kind.number:
        raise BitfoldError(f"the observer {name} takes no option, and {text!r} gives it one")
    try:
        return kind(float(option))  # type: ignore[call-arg]
    except ValueError as error:
        raise BitfoldError(f"{text!r}: {kind.number} ({error})") from error


def _kind(name: str) -> type[Observer]:
    found = (_BUILT_IN | _registered).get(name)
    if found is not None:
        return found
    for point in entry_points(group=GROUP, name=name):
        offered = point.load()
        if isinstance(offered, type) and issubclass(offered, Observer):
            return offered
        raise BitfoldError(f"the entry point '{name}' of group {GROUP} is {offered!r}, not an Observer")
    names = observer_names()
    raise BitfoldError(f"unknown observer {name!r}{nearest(name, names)}; observers are {', '.join(names)}")
