"""A target: something that runs folded graphs; what it takes of them, and how weights shall lie in memory.

In: a name. Out: the `Target` of that name, built in, registered by a program, or found by entry point.

    class Mine(Target):
        name = "mine"
        def supports(self, region): ...     # True, or Miss("only int8 weights")
        def lower(self, region): ...        # the region's body on the target's own operators
    register_target(Mine);  Pipeline.parse("fuse,lower{target=mine}")

A region is what `passes/fuse.py` outlines: a GraphModule around one matmul, convolution, attention or
embedding, whose constants come in as inputs. A package offers targets as entry points `bitfold.targets`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

import torch
from torch.fx import GraphModule, Node

from ..formats import BitfoldError, Format, Layout, Quantized, nearest
from ..passes import Miss

GROUP = "bitfold.targets"

Compiled = Callable[..., Any]

KEPT = "bitfold_kept"
"""In the `meta` of a graph that a target may keep for other processes: its frame's key (`frame_key.py`), and
which of the frame's arguments it takes."""


class Target(ABC):
    """Subclasses say what they take (`supports`) and how (`lower`); the rest has a sensible default."""

    name: ClassVar[str]
    shares_regions: ClassVar[bool] = False
    """Whether a compiled graph calls one body for regions that are alike (`shared_regions.py`)."""

    @abstractmethod
    def supports(self, region: GraphModule) -> bool | Miss:
        """Whether this target takes the region; `Miss` with the reason if not."""

    @abstractmethod
    def lower(self, region: GraphModule) -> GraphModule:
        """The region's body as this target runs it: same inputs, same output, in `region` itself or anew."""

    def layout(self, format: Format, k: int) -> Layout:
        """How a weight with rows of `k` numbers in `format` shall lie in memory: as it does, by default."""
        return format.layout

    def layout_for(self, reader: Node, format: Format, k: int) -> Layout:
        """The same for one reader, a `dequantize` in a region, for a target that cares what it multiplies."""
        return self.layout(format, k)

    def finish(self, gm: GraphModule) -> int:
        """Rewrites of the whole lowered graph, its regions put back into it; how many there were."""
        return 0

    def takes(self, codes: Quantized) -> bool:
        """Whether a weight with these very codes can be laid out so; asked once, before it is."""
        return True

    def compile(self, gm: GraphModule, example_inputs: Sequence[Any], config: Mapping[str, Any]) -> Compiled:
        """A function that runs the lowered graph, for `torch.compile`; by default the graph itself, eagerly.

        `example_inputs` are fake tensors and symbolic integers; `config` is Inductor's, for whom it concerns.
        """
        return gm.forward

    def recalled(self, key: str) -> Compiled | Miss:
        """What `compile` made of a graph whose frame had this key (`KEPT`), in this process or another."""
        return Miss(f"the target {self.name} keeps no compiled frames")


# Target name -> (module of this folder, class); imported when first asked for.
_BUILT_IN = {
    "reference": ("reference", "ReferenceTarget"),
    "cpu": ("cpu.target", "CpuTarget"),
    "cuda": ("cuda.target", "CudaTarget"),
}
# The one thing here that changes: what a program registers while it runs.
_registered: dict[str, type[Target]] = {}

T = TypeVar("T", bound=type[Target])


def register_target(cls: T) -> T:
    """Make a target known by its `name`; usable as a decorator. A name can be given once only."""
    if not (isinstance(cls, type) and issubclass(cls, Target)):
        raise BitfoldError(f"a target is a subclass of bitfold.Target, not {cls!r}")
    name = getattr(cls, "name", "")
    if not isinstance(name, str) or not name.isidentifier():
        raise BitfoldError(f"the target {cls.__name__} needs a class attribute `name` that is an identifier")
    taken = _registered.get(name)
    if name in _BUILT_IN or (taken is not None and taken.__qualname__ != cls.__qualname__):
        raise BitfoldError(f"a target named '{name}' exists already; give {cls.__name__} another name")
    _registered[name] = cls
    return cls


def target_names() -> list[str]:
    """Every name that `get_target` knows, sorted."""
    return sorted({*_BUILT_IN, *_registered, *(point.name for point in entry_points(group=GROUP))})


def get_target(name: str) -> Target:
    """The target of this name; BitfoldError with the nearest names when there is none."""
    if name in _registered:
        return _registered[name]()
    if name in _BUILT_IN:
        module, cls = _BUILT_IN[name]
        built_in: type[Target] = getattr(importlib.import_module(f".{module}", __package__), cls)
        return built_in()
    for point in entry_points(group=GROUP, name=name):
        found = point.load()
        if not (isinstance(found, type) and issubclass(found, Target)):
            raise BitfoldError(f"the entry point '{name}' of group {GROUP} is {found!r}, not a Target")
        return found()
    known = target_names()
    raise BitfoldError(f"there is no target '{name}'{nearest(name, known)}; there are {', '.join(known)}")


def default_target(device: torch.device) -> str:
    """The target for weights on `device`: one with its name, or the reference."""
    return device.type if device.type in ("cpu", "cuda") else "reference"
