"""Where a node comes from: the module path and the source line of the user's model.

Comes in: what `torch.export` or Dynamo left in a node's meta. Goes out: an `Origin`, and on new nodes the
same meta, copied from the nodes they replace.

    nn_module_stack {'L__self__fc': ('fc', Linear)}, stack_trace 'File "model.py", line 9 ...'
    -> Origin('fc', 'model.py', 9, 'h = self.fc(x)')
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch.fx import Node

FROM_KEY = "bitfold_from"
"""In `node.meta`: names of the captured nodes that a new node stands for."""

VIRTUAL_NODE = "bitfold_virtual_node"
"""In `node.meta`: the virtual node (a slice of the machine, by name or number) that a node is meant for. No
pass of this package splits a graph over virtual nodes; who does writes it on the captured nodes, and what
passes make of them is on the first source's."""

_CARRIED = ("stack_trace", "nn_module_stack", "from_node", "torch_fn", "source_fn_stack")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>[^\n]*)\n(?P<text>[^\n]*)')

# Frames of these are wrappers around the user's line: torch's own modules, and what decorates a
# transformers model. A model that lives in transformers/models is the user's model all the same.
_WRAPPERS = re.compile(
    r"(^|/)torch/|(^|/)transformers/utils/|(^|/)transformers/modeling_layers|(^|/)accelerate/|^<"
    r"|(^|/)(functools|inspect|contextlib)\.py$"
)
_MODULES = re.compile(r"\._modules\['([^']*)'\]")
_INDEX = re.compile(r"\[(-?\d+|'[^']*')\]")
# `L['args'][0]` is the model where a decorator wraps its forward in `*args`.
_ROOT = re.compile(r"^(L\['args'\]\[\d+\]|L\['[^']*'\]|G\['[^']*'\]|L__[A-Za-z0-9]+__?)\.?")
_SLICE = re.compile(r"\.?\[?slice\([^)]*\)\]?")
# What torch puts in the place of a module stack on nodes that its own passes made of inputs.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
_GETATTR = re.compile(r"getattr\((.*), '([^']*)'\)")


@dataclass(frozen=True)
class Origin:
    """A place in the user's model; "" and 0 where it is not known."""

    module_path: str = ""
    source_file: str = ""
    line: int = 0
    text: str = ""

    @property
    def where(self) -> str:
        """`model.py:41`, or "" when the line is not known."""
        return f"{os.path.basename(self.source_file)}:{self.line}" if self.source_file else ""


def origin(node: Node) -> Origin:
    """Where `node` comes from, as far as its meta tells."""
    file, line, text = source_line(node.meta.get("stack_trace") or "")
    return Origin(_innermost(node.meta.get("nn_module_stack")), file, line, text)


@lru_cache(maxsize=16384)
def source_line(stack_trace: str) -> tuple[str, int, str]:
    """File, line and text of the innermost frame of the user's own code ("", 0, "" when there is none)."""
    frames = [found.groupdict() for found in _FRAME.finditer(stack_trace)]
    own = [frame for frame in frames if not _WRAPPERS.search(frame["file"])]
    if not frames:
        return "", 0, ""
    frame = (own or frames)[-1]
    return frame["file"], int(frame["line"]), frame["text"].strip()


def _innermost(stack: Any) -> str:
    if not stack:
        return ""
    last = next(reversed(stack.values()))
    return module_path(last[0] if isinstance(last, tuple) else str(last))


@lru_cache(maxsize=16384)
def module_path(spelled: str) -> str:
    """A dotted module path from the ways in which torch spells it.

    `L['self']._modules['layers']._modules['0']`, `L['model'].layers[0]` and `layers.0` are all `layers.0`.
    "" is the model itself, or no module at all.
    """
    path = "" if spelled == _NO_MODULE else spelled
    while (found := _GETATTR.search(path)) is not None:
        path = path.replace(found.group(0), f"{found.group(1)}.{found.group(2)}")
    path = _MODULES.sub(r".\1", path)
    path = _SLICE.sub("", path)
    path = _ROOT.sub("", path)
    path = _INDEX.sub(lambda found: "." + found.group(1).strip("'"), path)
    return path.strip(".")


def inside_module(stack_trace: str) -> str:
    """The frames of a recorded stack from the traced module on, without those that led to the tracing."""
    _, found, inside = stack_trace.rpartition("functional_call")
    frames = inside[inside.find("File ") :] if found and "File " in inside else ""
    return frames if found else stack_trace


def breaking_point(error: BaseException) -> str:
    """What went wrong while a model was traced, on one line: the model's own line, then the reason."""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not _WRAPPERS.search(frame.filename)
        and not frame.filename.startswith(os.path.dirname(__file__) + os.sep)
    ]
    if not frames:
        return reason
    last = frames[-1]
    return f"{os.path.basename(last.filename)}:{last.lineno} `{last.line}`: {reason}"


def inherit(new: Node, sources: Iterable[Node]) -> Node:
    """Give `new` the origin and the virtual node of the first of `sources` that has one, and the names of
    all. Returns `new`."""
    known = list(sources)
    for key in (*_CARRIED, VIRTUAL_NODE):
        # 0 is a virtual node's name as good as any.
        value = next((node.meta[key] for node in known if node.meta.get(key) not in (None, "")), None)
        if value is not None:
            new.meta.setdefault(key, value)
    names: dict[str, None] = {}
    for node in known:
        names.update(dict.fromkeys(node.meta.get(FROM_KEY) or (node.name,)))
    new.meta[FROM_KEY] = tuple(names)
    return new


def has_provenance(node: Node) -> bool:
    """Whether anything says where the node comes from."""
    meta = node.meta
    return FROM_KEY in meta or any(key in meta for key in _CARRIED)
