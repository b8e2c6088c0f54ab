"""Gradient estimators: how a gradient comes back through a rounding, one a file, by name in one table.

In: a name. Out: the `Estimator` it stands for, or an error with the nearest names.

    register(Half())    then  bf.Qat(weight="half")  and every other text of a gradient may name it

A package may also name an estimator, made, as an entry point in the group `bitfold.estimators`; it is loaded
when a text first asks for its name.
"""

from __future__ import annotations

import inspect
import re
import uuid
from importlib.metadata import entry_points

from .. import cache_tag
from ..errors import FormatError, nearest
from .clip import Clip
from .estimator import Back, Estimator, Kernel
from .lsq import Lsq
from .pact import Pact
from .smooth import Smooth
from .straight import Straight

__all__ = ["ESTIMATORS", "GROUP", "Back", "Estimator", "Kernel", "known", "named", "register"]

ESTIMATORS: dict[str, Estimator] = {one.name: one for one in (Straight(), Clip(), Lsq(), Pact(), Smooth())}
GROUP = "bitfold.estimators"

_registered: dict[str, Estimator] = {}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[a-z][a-z0-9]*")
# What a generated kernel and a prepared module call otherwise.
_RESERVED, _TAKEN = ("forward",), ("x",)


def register(estimator: Estimator) -> None:
    """Makes the estimator's name mean it in every gradient's text from now on. Raises FormatError for a name
    that is taken, or that no text could have."""
    if not isinstance(estimator, Estimator):
        raise FormatError(f"only an Estimator, made, can be registered, not {estimator!r}")
    name = getattr(estimator, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
        raise FormatError(
            f"a gradient's name is letters, digits and underscores, other than {', '.join(_RESERVED)}, "
            f"not {name!r}"
        )
    if not isinstance(estimator.learns, tuple | list) or not all(
        isinstance(w, str) for w in estimator.learns
    ):
        raise FormatError(
            f"what {name} learns is a tuple of names, such as ('step',), not {estimator.learns!r}"
        )
    wrong = [one for one in estimator.learns if not _WORD.fullmatch(one) or one in _TAKEN]
    if wrong or len(set(estimator.learns)) < len(estimator.learns):
        raise FormatError(
            f"{name} learns {', '.join(map(repr, estimator.learns))}; each is to be one word of its own, of "
            "small letters and digits, other than 'x'"
        )
    if estimator.identity and estimator.learns:
        raise FormatError(f"{name} keeps nothing for its gradient (identity), so that it cannot learn")
    if estimator.learns and type(estimator).for_held is Estimator.for_held:
        raise FormatError(f"{name} learns {', '.join(estimator.learns)}, and has no for_held() that says how")
    if estimator.identity and (type(estimator).for_x is not Straight.for_x or estimator.number is not None):
        raise FormatError(
            f"{name} has a for_x() or a number that nothing would read (identity); derive it from Straight, "
            "without a number, or leave identity out"
        )
    if (ESTIMATORS | _registered).get(name, estimator) is not estimator:
        raise FormatError(f"the name {name!r} is taken; register the estimator under another name")
    number = estimator.number
    if number is not None and (not isinstance(number, int | float) or isinstance(number, bool)):
        raise FormatError(f"the number of {name} is an int or a float, not {number!r}")
    if number is not None:
        estimator.check_number(number)
    _registered[name] = estimator
    cache_tag.add(f"{name} {_source(estimator)}")


def named(name: str) -> Estimator:
    """The estimator that `name` stands for. Raises FormatError for a name that nothing has."""
    for table in (ESTIMATORS, _registered):
        if name in table:
            return table[name]
    for entry in entry_points(group=GROUP, name=name):
        register(entry.load())
        if name in _registered:
            return _registered[name]
        raise FormatError(f"the entry point {name!r} of {GROUP} is an estimator of another name")
    raise FormatError(f"a gradient is one of {', '.join(known())}, not {name!r}{nearest(name, known())}")


def known() -> list[str]:
    """Names, those that callers added last."""
    return [*ESTIMATORS, *_registered]


def _source(estimator: Estimator) -> str:
    """What torch's compile caches must know of it: its whole file; of one that is in no file, that no cache
    can know it."""
    module = inspect.getmodule(type(estimator))
    try:
        return inspect.getsource(module) if module is not None else uuid.uuid4().hex
    except (OSError, TypeError):
        return uuid.uuid4().hex
