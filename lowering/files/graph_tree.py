"""How a program is called, as data: the names of its arguments and the nesting of what it takes and returns.

In: the pytree signature that `torch.export` leaves on a graph. Out: JSON data, and the signature for it.

    forward(input_ids, *, mask) -> {"logits": ...}
    <-> {"args": ["input_ids", "mask"], "in": ["tuple", [["tuple", ["*"]], ["dict", ["mask"], ["*"]]]],
         "out": ["dict", ["logits"], ["*"]]}

Only tuples, lists and dicts are rebuilt freely. Any other container (a transformers `ModelOutput`) is named,
must be registered with pytree by whoever loads the file, and is never imported from here: a file does not
choose what is imported.
"""

from __future__ import annotations

import json
from typing import Any

import torch.utils._pytree as pytree
from torch.fx import Graph, GraphModule
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from .graph_values import GraphDataError, plain_name

_LEAF = "*"
_PLAIN = {"tuple": tuple, "list": list}
# Their contexts name modules and functions to import.
_REFUSED = ("collections.defaultdict", "collections.namedtuple", "collections.deque", "functools.partial")


def dump_signature(graph: Graph) -> dict[str, Any] | None:
    """The signature as data; None for a graph that is called with its placeholders in order."""
    codegen = graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        return None
    info = codegen.pytree_info
    return {
        "args": list(info.orig_args),
        "in": _dump(info.in_spec),
        "out": None if info.out_spec is None else _dump(info.out_spec),
    }


def set_signature(gm: GraphModule, data: dict[str, Any] | None) -> None:
    """Give `gm` the signature that `dump_signature` wrote."""
    if data is None:
        return
    names = [plain_name(name) for name in data["args"]]
    out = None if data["out"] is None else _load(data["out"])
    gm.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, _load(data["in"]), out)))


def _dump(spec: pytree.TreeSpec) -> Any:
    if spec.is_leaf():
        return _LEAF
    children = [_dump(child) for child in spec.children()]
    if spec.type in (tuple, list):
        return [spec.type.__name__, children]
    if spec.type is dict:
        return ["dict", _strings(spec.context), children]
    name = _registered_name(spec.type)
    return ["of", name, _plain_context(name, spec), children]


def _load(data: Any) -> pytree.TreeSpec:
    if data == _LEAF:
        return pytree.treespec_leaf()
    kind, *rest = data
    if kind in _PLAIN:
        return pytree.TreeSpec(_PLAIN[kind], None, [_load(child) for child in rest[0]])
    if kind == "dict":
        return pytree.TreeSpec(
            dict, [plain_name(key) for key in rest[0]], [_load(child) for child in rest[1]]
        )
    if kind == "of":
        name, context, children = rest
        type_ = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name)
        if name in _REFUSED or type_ is None:
            raise GraphDataError(
                f"the saved program takes or returns a {name}, which is not known here; import the module "
                "that defines it before bf.load"
            )
        return pytree.TreeSpec(type_, context, [_load(child) for child in children])
    raise GraphDataError(f"the signature in this file means nothing: {data!r}")


def _registered_name(type_: Any) -> str:
    known = pytree.SUPPORTED_SERIALIZED_TYPES.get(type_)
    name = getattr(known, "serialized_type_name", None)
    if not isinstance(name, str) or name in _REFUSED:
        raise GraphDataError(
            f"the program takes or returns a {type_.__module__}.{type_.__qualname__}, which cannot be saved; "
            "let the model's forward take and return tensors, tuples, lists and dicts"
        )
    return name


def _plain_context(name: str, spec: pytree.TreeSpec) -> Any:
    context = spec.context
    try:
        if json.loads(json.dumps(context)) == context:
            return context
    except TypeError:
        pass
    raise GraphDataError(
        f"the program takes or returns a {name} that holds more than plain data and cannot be saved"
    )


def _strings(keys: Any) -> list[str]:
    for key in keys:
        if not isinstance(key, str):
            raise GraphDataError(
                f"the program takes or returns a dict with the key {key!r}; only names can be saved"
            )
    return list(keys)
