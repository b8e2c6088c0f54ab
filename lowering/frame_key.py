"""What tells one frame from another: all that the code compiled for it depends on, as one word.

In: Dynamo's graph, what it was called with, further words. Out: a digest; None where something in the graph
has no name that means the same in another process.

    %x, %w : linear(%x, %w)   ->   "3f9c.."; the same wherever sizes, torch and this package are

A graph has a key if its operators are torch's or bitfold's own and its inputs are plain tensors of known
sizes. Values of tensors are no part of it: what is compiled must not depend on them.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from ..codegen.cpp.vectors import widest
from ..passes import Miss

_OWNERS = ("torch", "_operator", "operator", "builtins", "math")
_NAMESPACES = ("aten", "prims", "bitfold")
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.memory_format, torch.layout, type(None))


class _Nameless(Exception):
    """What has no name."""


def frame_key(gm: GraphModule, inputs: Sequence[Any], words: Iterable[str]) -> str | Miss:
    """The digest, or what stands in its way. words: what else the caller's code depends on."""
    try:
        told = [*_graph(gm), *_inputs(gm, inputs), *_process(), *words]
    except _Nameless as error:
        return Miss(f"{error} has no name for another process")
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:40]


def _graph(gm: GraphModule) -> list[str]:
    names: dict[Node, str] = {}
    found = []
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "call_function", "call_method", "output"):
            raise _Nameless(f"{node.op} {node.target}")
        names[node] = f"%{len(names)}"
        target = _target(node.target) if node.op == "call_function" else node.op
        method = str(node.target) if node.op == "call_method" else ""
        arguments = () if node.op == "placeholder" else (node.args, node.kwargs)
        found.append(f"{target} {method} {_word(arguments, names)}")
    return found


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in _NAMESPACES:
            raise _Nameless(f"the operator {target}")
        return str(target)
    if isinstance(target, torch._ops.OpOverloadPacket):  # torch.ops.library.name, as Dynamo leaves it
        known = str(target._qualified_op_name)
        if known.partition("::")[0] not in _NAMESPACES:
            raise _Nameless(f"the operator {known}")
        return known
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    owner = getattr(target, "__objclass__", None) or getattr(target, "__self__", None)
    module = module or getattr(owner, "__module__", None) or type(owner).__module__
    if not name or "<" in name or str(module).partition(".")[0] not in _OWNERS:
        raise _Nameless(f"the function {target}")
    return f"{module}.{name}"


def _word(value: Any, names: dict[Node, str]) -> str:
    """A value as text that differs where the value does."""
    if isinstance(value, Node):
        return names[value]
    if type(value) in _PLAIN or value is Ellipsis:
        return repr(value)
    if isinstance(value, slice):
        return f"slice{_word((value.start, value.stop, value.step), names)}"
    if type(value) in (list, tuple, torch.Size) or type(value).__name__ == "immutable_list":
        return f"{'[' if isinstance(value, list) else '('}{','.join(_word(one, names) for one in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{_word(k, names)}:{_word(v, names)}' for k, v in value.items())}}}"
    raise _Nameless(f"{value!r:.40}")


def _inputs(gm: GraphModule, inputs: Sequence[Any]) -> list[str]:
    """Sizes and all else that a tensor is, but its numbers."""
    storages = set()
    found = []
    for node, given in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        value = node.meta.get("example_value", given)
        if type(value) not in (FakeTensor, Tensor, torch.nn.Parameter):
            raise _Nameless(f"an input of type {type(value).__name__}")
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        if not all(isinstance(size, int) for size in sizes) or value.layout is not torch.strided:
            raise _Nameless("a size that varies")
        if value.untyped_storage()._cdata in storages:
            raise _Nameless("memory that two inputs share")
        storages.add(value.untyped_storage()._cdata)
        flags = (value.requires_grad, value.is_conj(), value.is_neg(), value.is_inference())
        static = bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))
        found.append(f"{tuple(value.shape)} {value.stride()} {value.storage_offset()} {value.dtype} "
                     f"{value.device} {flags} {static}")  # fmt: skip
    return found


def _process() -> list[str]:
    """Whatever of this process code depends on."""
    from torch._inductor import config

    modes = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        widest().name,
        torch.backends.mkldnn.enabled,
    )
    return [
        torch.__version__,
        repr(modes),
        torch.compiler.config.cache_key_tag,
        repr(sorted(config.save_config_portable().items(), key=lambda item: item[0])),
        repr([os.environ.get(name) for name in ("CXX", "OMP_NUM_THREADS")]),
        _processor(),
        _sources(),
    ]


@cache
def _processor() -> str:
    """What the processor can do: Inductor compiles for all of it (-march=native), and processes of several
    machines may share a folder."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8", errors="replace").splitlines() if told.exists() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {flags}"


@cache
def _sources() -> str:
    """A digest of this package's code."""
    made = hashlib.sha256()
    root = Path(__file__).parent.parent
    for folder in ("formats", "passes", "codegen", "lowering"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp"):
                made.update(path.name.encode() + path.read_bytes())
    return made.hexdigest()
