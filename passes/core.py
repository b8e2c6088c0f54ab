"""What every pass shares: the `Pass` contract, a graph's `State`, and `Miss`, a "no" with its reason.

Comes in: nothing but `torch.fx`. Goes out: the vocabulary in which passes are written.

    @dataclass(frozen=True)
    class DropDropout(Pass):                  # the fields are the pass's options
        name: ClassVar[str] = "drop_dropout"
        def apply(self, gm) -> int:           # rewrites made
            ...

A rewrite that does not apply returns `Miss("its weight is not constant")`, which is false; when a recipe had
asked for that rewrite, the pass says so with `report(gm, node, miss, asked="int4[g128]")` and the trace
prints it.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor
from torch.fx import GraphModule, Node

from .provenance import origin
from .stages import Stage

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ..formats.format import Quantized

Scope = Literal["program", "frame", "module"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and how many there are (0: not known)."""

META_KEY = "bitfold"
"""Where a graph keeps its `State` (`gm.meta`) and a node its annotation (`node.meta`)."""


@dataclass(frozen=True)
class Miss:
    """Why something did not apply. False, so that `if not (found := match(node)): ...` reads well."""

    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class MissRecord:
    """A request that a node did not get: what the trace prints and what `report` collects."""

    node: str
    module_path: str
    source: str
    asked: str
    reason: str

    def __str__(self) -> str:
        where = self.module_path or self.node
        at = f" ({self.source})" if self.source else ""
        asked = f"{self.asked}: " if self.asked else ""
        return f"{where}{at}: {asked}{self.reason}"


class WeightStore(Protocol):
    """Folded weights shared by the graphs and recompiles of one model; the frame scope's backend owns it."""

    def folded(
        self, parameter: Tensor, expression: str, format: str, make: Callable[[Tensor], Quantized]
    ) -> Quantized:
        """The codes kept for this parameter, expression of it and format, or else `make(parameter)`.

        `make` may be called again later, with the same parameter, when the parameter has changed.
        """
        ...


class State:
    """What passes know of one graph beyond its nodes. One for each graph; made and found by `state(gm)`."""

    def __init__(
        self,
        scope: Scope = "program",
        stage: Stage = Stage.captured,
        *,
        params: dict[str, Tensor] | None = None,
        param_paths: dict[str, str] | None = None,
        store: WeightStore | None = None,
        stored: dict[str, Quantized] | None = None,
        path_prefix: str = "",
    ) -> None:
        self.scope: Scope = scope
        self.stage = stage
        self.params: dict[str, Tensor] = params or {}
        """Frame scope: placeholder name -> the user's own tensor, which is never altered."""
        self.param_paths: dict[str, str] = param_paths or {}
        """Frame scope: placeholder name -> path of that parameter in the user's model."""
        self.store = store
        self.stored: dict[str, Quantized] = stored or {}
        """Parameter path in the model -> codes that came with the model, to be taken as they are."""
        self.path_prefix = path_prefix
        """Module scope: where the captured module sits in the model; "" elsewhere."""
        self.misses: list[MissRecord] = []
        self.told = 0
        """How many of the misses a trace has shown already."""
        self.fake_mode: FakeTensorMode | None = None
        self.mutated: frozenset[str] | None = None
        """Attributes and placeholders that the graph writes to: never constants. None: not looked at yet."""
        self._owner: weakref.ref[GraphModule] | None = None

    def path(self, name: str) -> str:
        """The path in the model of what the captured module calls `name`."""
        return ".".join(part for part in (self.path_prefix, name) if part)

    def local(self, path: str) -> str:
        """What the captured module calls a path of the model; "" for the module itself."""
        return below(path, self.path_prefix)

    def copy(self) -> State:
        """A state for a copy of the graph: its own records, the same tensors and the same store."""
        twin = State(
            self.scope,
            self.stage,
            params=dict(self.params),
            param_paths=dict(self.param_paths),
            store=self.store,
            stored=dict(self.stored),
            path_prefix=self.path_prefix,
        )
        twin.misses, twin.told = list(self.misses), self.told
        twin.fake_mode = self.fake_mode
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        # A pickled graph is at rest: weak references, fake modes and the user's live tensors stay behind.
        return {
            "scope": self.scope,
            "stage": self.stage,
            "path_prefix": self.path_prefix,
            "misses": self.misses,
        }

    def __setstate__(self, data: dict[str, Any]) -> None:
        self.__init__(data["scope"], data["stage"], path_prefix=data["path_prefix"])  # type: ignore[misc]
        self.misses = list(data["misses"])


def below(path: str, prefix: str) -> str:
    """A path in the model as it is called inside the module at `prefix`: "up.weight" of "layers.0.up.weight"
    below "layers.0"; one that is elsewhere stays as it is."""
    return "" if path == prefix else path.removeprefix(f"{prefix}.").strip(".")


def state(gm: GraphModule) -> State:
    """The graph's state, made on first use. A copied graph gets a copy of its own, never the original's."""
    found = gm.meta.get(META_KEY)
    if found is None:
        found = State()
    elif found._owner is not None and found._owner() is not gm:
        found = found.copy()
    found._owner = weakref.ref(gm)
    gm.meta[META_KEY] = found
    return found


def report(gm: GraphModule, node: Node, miss: Miss, asked: str = "") -> None:
    """Record that `node` did not get what was asked for, and why."""
    at = origin(node)
    here = state(gm)
    here.misses.append(MissRecord(node.name, here.path(at.module_path), at.where, asked, miss.reason))


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a graph. Subclasses are frozen dataclasses whose fields are the pass's options.

    `requires`: a stage means "this one or a later one", a tuple means "one of these", None means any.
    `produces`: the stage of the graph afterwards if it was an earlier one; None leaves it.
    `apply` leaves a graph that verifies at its stage, and need not call `recompile` (the pipeline does).
    """

    name: ClassVar[str]
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = None
    produces: ClassVar[Stage | None] = None

    @abstractmethod
    def apply(self, gm: GraphModule) -> int:
        """Rewrite `gm` in place; return how many rewrites were made."""
