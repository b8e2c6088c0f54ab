"""Prepared modules as the original ones: for good, or for as long as a block of code runs.

In: a model with prepared modules. Out: the same modules, of the classes that they had, without what training
had added, which is handed out; and the way back, module by module, if the block fails.

    with unprepared(model) as back:     model.fc: an nn.Linear; back.extra["fc"]: {"weight_step": ..}
        ...                             raises: model.fc is prepared again, with all it had learned
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .begin import COUNTED
from .bodies import BODIES
from .prepared import Prepared, unprepared_class

_TABLES = ("_parameters", "_buffers", "_modules")


class Unprepared:
    """Modules that are original again for a while, and what brings each of them back. `extra`: what training
    had added to each, by path."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {path: one for path, one in model.named_modules() if isinstance(one, Prepared)}
        self.extra: dict[str, dict[str, Tensor]] = {}
        self._kept = {
            path: (type(one), dict(one.__dict__), [dict(one.__dict__[table]) for table in _TABLES])
            for path, one in self.modules.items()
        }

    def forget(self, path: str) -> None:
        """Let a module stay what it has become, and go of what training had of it, its weight included."""
        for held in (self.modules, self.extra, self._kept):
            held.pop(path, None)

    def restore(self) -> None:
        """Every module that is not forgotten as it was, whatever it has become."""
        for path, module in self.modules.items():
            module.__class__, attributes, tables = self._kept[path]
            module.__dict__.clear()
            module.__dict__.update(attributes, **dict(zip(_TABLES, tables, strict=True)))


@contextmanager
def unprepared(model: nn.Module) -> Iterator[Unprepared]:
    """The model with original modules. If the block raises, every module that it did not forget is prepared
    again, with all it had learned."""
    back = Unprepared(model)
    try:
        for path, module in back.modules.items():
            back.extra[path] = unprepare(module)
        yield back
    except BaseException:
        back.restore()
        raise


def unprepare(module: Prepared) -> dict[str, Tensor]:
    """Be the original module again, in place; returns what training had added to it, by name."""
    extra = {name: getattr(module, name) for name in module.extra}
    for name in extra:
        delattr(module, name)
    for name in BODIES:
        module._modules.pop(name, None)
    own = module.own_forward
    for name in (*Prepared.__annotations__, COUNTED):
        module.__dict__.pop(name, None)
    module.__class__ = unprepared_class(module)
    module.__dict__.update(own)
    return extra
