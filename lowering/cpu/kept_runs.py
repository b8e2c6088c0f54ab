"""A frame that became C functions alone, kept on disk: the next process calls them and compiles nothing.

In: a key (`frame_key.py`), and a `Run` whose pieces were joined. Out: the same run, of another process.

    keep(key, plan)           bitfold/frames/3f9c...json, beside Inductor's own cache
    recalled(key)(x, w, ..)   [before, layer, layer, .., behind] by their addresses

What is kept are the names of the libraries that Inductor compiled, what each takes and makes, and the texts
of the kernels that they call. The key says all that they depend on; where a library is gone, or a file is not
what was written, nothing is recalled and the frame is compiled. Frames that were not asked for longest are
removed (`codegen/cpp/kept_files.py`).
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.fx import GraphModule

from ...codegen import CodegenError
from ...codegen.attention import AttentionSpec
from ...codegen.conv import ConvSpec
from ...codegen.cpp.kept_files import FRAMES, read, write
from ...codegen.cpp.library import folder
from ...codegen.cpp.sequence_build import Native, sequence
from ...codegen.spec import GemmSpec
from ...formats import BitfoldError
from ...passes import Miss
from ..target import Compiled
from .beside import BESIDE, BETWEEN
from .entries import ENTRY, Entry
from .run_pieces import Place, Run, Step

_bitfold = torch.ops.bitfold
# Operators whose kernels have texts, and the argument that is the text.
TEXTS = {
    "fused": (_bitfold.fused.default, 1),
    "conv": (_bitfold.conv.default, 1),
    "attention": (_bitfold.attend_few.default, 5),
}


@dataclass(frozen=True)
class Called:
    """A C function by its library; given, made: numbers of values, of which the first are the arguments."""

    library: str
    given: tuple[int, ...]
    made: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """given: which of the frame's arguments there are; result: numbers of values, nested in lists as what is
    returned, None for None; written: arguments that are written to; kernels: texts by `TEXTS`' names;
    queries: whether torch's attention is ours."""

    given: tuple[int, ...]
    steps: tuple[Called, ...]
    result: Any
    written: tuple[int, ...]
    kernels: dict[str, tuple[str, ...]]
    queries: bool

    @classmethod
    def read(cls, text: str) -> Plan:
        """Of the text that `keep` wrote; ValueError, TypeError or KeyError for another."""
        told = json.loads(text)
        steps = tuple(
            Called(str(one["library"]), tuple(one["given"]), tuple(one["made"])) for one in told.pop("steps")
        )
        kernels = {str(name): tuple(texts) for name, texts in told.pop("kernels").items()}
        given, written = tuple(told.pop("given")), tuple(told.pop("written"))
        return cls(steps=steps, kernels=kernels, given=given, written=written, **told)


def texts_of(gm: GraphModule) -> dict[str, tuple[str, ...]]:
    """The kernels that a lowered graph calls."""
    found = {}
    for name, (op, at) in TEXTS.items():
        calls = gm.graph.find_nodes(op="call_function", target=op)
        found[name] = tuple(dict.fromkeys(str(node.args[at]) for node in calls))
    joined = gm.graph.find_nodes(op="call_function", target=BESIDE)
    texts = [text for node in joined for text in str(node.args[1]).split(BETWEEN)]
    found["fused"] = tuple(dict.fromkeys([*found["fused"], *texts]))
    return found


def keeper(
    key: str, given: Sequence[int], gm: GraphModule
) -> Callable[[Run, Sequence[Step], Mapping[int, Entry | Miss]], None]:
    """What keeps the run of a graph, which takes `given` of the frame's arguments, once it is known to be C
    functions alone."""
    FRAMES.bytes()  # a bound that is no number is said before anything is computed
    kernels = texts_of(gm)
    queries = bool(gm.graph.find_nodes(op="call_function", target=_bitfold.few_queries.default))

    def told(run: Run, steps: Sequence[Step], entries: Mapping[int, Entry | Miss]) -> None:
        called = []
        for step in steps:
            found = entries[id(step.run)]
            if not isinstance(found, Entry):
                return
            called.append(Called(found.library._name, step.given, step.made))
        try:
            result = _described(run.result)
        except TypeError:
            return
        keep(key, Plan(tuple(given), tuple(called), result, run.written, kernels, queries))

    return told


def _described(result: Any) -> Any:
    if isinstance(result, Place):
        return result.index
    if isinstance(result, list | tuple):
        return [_described(one) for one in result]
    if result is not None:
        raise TypeError(f"a graph that returns {result!r}")
    return None


def place(key: str) -> Path:
    """Where a frame lies."""
    return folder().parent / "frames" / f"{key}.json"


def keep(key: str, plan: Plan) -> None:
    """Write it. A folder that cannot be written has been told of by who compiled the kernels."""
    try:
        write(place(key), json.dumps(asdict(plan)), FRAMES)
    except OSError:
        return


def recalled(key: str) -> Compiled | Miss:
    """What a process before compiled for this key."""
    if FRAMES.bytes() == 0:
        return Miss("no frames are to be kept")
    path = place(key)
    try:
        plan = Plan.read(read(path))
    except OSError:
        return Miss("no process has compiled this frame")
    except (ValueError, TypeError, KeyError):
        return Miss(f"{path} is not what was written there")
    try:
        _know(plan)
        return _Recalled(plan)
    except (OSError, BitfoldError, CodegenError, AttributeError) as error:
        return Miss(f"a library of this frame cannot be had: {error}")


def _know(plan: Plan) -> None:
    """The operators and kernels that the libraries call, which they look for when they are loaded."""
    if plan.kernels.get("fused"):
        from ...codegen.cpp.build import know

        know([GemmSpec.parse(text) for text in plan.kernels["fused"]])
    if plan.kernels.get("conv"):
        from ...codegen.cpp.conv_build import know as know_conv

        know_conv([ConvSpec.parse(text) for text in plan.kernels["conv"]])
    if plan.kernels.get("attention") or plan.queries:
        from ...codegen.cpp.attention_build import attention_operator, know_attention

        attention_operator()
        know_attention([AttentionSpec.parse(text) for text in plan.kernels.get("attention", ())])


class _Recalled:
    """Calls the functions of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.libraries = {one.library: ctypes.CDLL(one.library) for one in plan.steps}
        steps = []
        for one in plan.steps:
            address = ctypes.cast(getattr(self.libraries[one.library], ENTRY), ctypes.c_void_p).value
            assert address is not None
            steps.append(Native(address, one.given, one.made))
        made = {i for one in plan.steps for i in one.made}
        self.results = [i for i in _numbers(plan.result) if i in made]
        self.run = sequence(steps, len(plan.given), self.results)

    def __call__(self, *args: Any) -> Any:
        values: list[Tensor] = [args[i] for i in self.plan.given]
        found = dict(zip(self.results, self.run(values), strict=True))
        if self.plan.written:
            increment_version([values[i] for i in self.plan.written])
        return _filled(self.plan.result, values, found)


def _numbers(result: Any) -> list[int]:
    if isinstance(result, int):
        return [result]
    inner = [_numbers(one) for one in result] if isinstance(result, list | tuple) else []
    return list(dict.fromkeys(i for numbers in inner for i in numbers))


def _filled(result: Any, values: Sequence[Any], found: dict[int, Tensor]) -> Any:
    if isinstance(result, int):
        return found[result] if result in found else values[result]
    return tuple(_filled(one, values, found) for one in result) if result is not None else None
