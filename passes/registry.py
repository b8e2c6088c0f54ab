"""Passes by name: the built-in ones, those registered by a program, and those of installed packages.

Comes in: a name. Goes out: the `Pass` class.

    @register_pass
    @dataclass(frozen=True)
    class DropDropout(Pass): name: ClassVar[str] = "drop_dropout"; ...
    find_pass("drop_dropout")  ->  DropDropout

A package offers its passes by the entry-point group `bitfold.passes` (name -> class), looked at when a name
is not known otherwise.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TypeVar

from ..formats.errors import BitfoldError, nearest
from .core import Pass

GROUP = "bitfold.passes"

# Pass name -> module in this folder that defines it; imported when first asked for.
_BUILT_IN = {
    "normalize": "normalize",
    "fold_constants": "cleanup",
    "eliminate_dead": "cleanup",
    "train_mode": "training.mode",
    "fold_batch_norm": "batch_norm",
    "annotate": "annotate",
    "observe": "observing.observe",
    "share": "observing.share",
    "fake_quantize": "training.fake_quantize",
    "train_quantizers": "training.quantizers",
    "settle_quantizers": "training.settle_quantizers",
    "train_batch_norm": "training.batch_norm",
    "settle_batch_norm": "training.batch_norm",
    "freeze_norm": "training.freeze_norm",
    "settle_frozen_norm": "training.freeze_norm",
    "sparsify": "sparsify",
    "fold": "fold",
    "fuse": "fuse",
    "clip": "algorithms.clip",
    "follow": "algorithms.follow",
    "gptq": "algorithms.gptq",
    "refit": "algorithms.refit",
    "hqq": "algorithms.hqq",
    "descend": "algorithms.descend",
    "learn": "algorithms.learn",
    "tune": "algorithms.tune",
    "awq": "algorithms.awq",
    "smooth": "algorithms.smooth",
    "rotate": "algorithms.rotate",
    "correct_bias": "algorithms.correct_bias",
    "equalize": "algorithms.equalize",
}

# The one thing here that changes: what a program registers while it runs.
_registered: dict[str, type[Pass]] = {}

P = TypeVar("P", bound=type[Pass])


def register_pass(cls: P) -> P:
    """Make a pass known by its `name`, for pipelines written as text. A name can be given once only."""
    name = getattr(cls, "name", "")
    if not isinstance(name, str) or not name.isidentifier():
        raise BitfoldError(f"the pass {cls.__name__} needs a class attribute `name` that is an identifier")
    taken = _registered.get(name)
    if name in _BUILT_IN or (taken is not None and taken.__qualname__ != cls.__qualname__):
        raise BitfoldError(f"a pass named '{name}' exists already; give {cls.__name__} another name")
    _registered[name] = cls
    return cls


def pass_names() -> list[str]:
    """Every name that `find_pass` knows, sorted."""
    return sorted({*_BUILT_IN, *_registered, *(point.name for point in entry_points(group=GROUP))})


def find_pass(name: str) -> type[Pass]:
    """The pass of this name; BitfoldError with the nearest names when there is none."""
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        return _built_in(name)
    for point in entry_points(group=GROUP, name=name):
        found = point.load()
        if not (isinstance(found, type) and issubclass(found, Pass)):
            raise BitfoldError(f"the entry point '{name}' of group {GROUP} is {found!r}, not a Pass")
        return found
    raise BitfoldError(f"there is no pass '{name}'{nearest(name, pass_names())}")


def _built_in(name: str) -> type[Pass]:
    module = importlib.import_module(f".{_BUILT_IN[name]}", __package__)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Pass) and getattr(value, "name", "") == name:
            return value
    raise RuntimeError(f"passes/{_BUILT_IN[name].replace('.', '/')}.py defines no pass named '{name}'")
