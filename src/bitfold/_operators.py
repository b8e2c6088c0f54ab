"""The operators that lowered graphs are made of, registered with torch when bitfold is imported.

In: nothing. Out: `torch.ops.bitfold.cpu_linear`, `.rows`, `.fused`, `.conv`. What they compute is imported
with the first call, so that a saved program finds its operators, and importing bitfold stays light.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .formats.batched import one_by_one
from .formats.round_groups import KERNELS

_library: Any = torch.library.Library("bitfold", "FRAGMENT")  # type: ignore[no-untyped-call]


def _later(module: str, name: str) -> Callable[..., Any]:
    @cache
    def found() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(
            importlib.import_module(f".lowering.{module}", __package__), name
        )
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        return found()(*args, **kwargs)

    return call


_library.define("cpu_linear(Tensor x, Tensor[] parts, str format, SymInt k, Tensor? bias=None) -> Tensor")
_library.define("rows(Tensor[] parts, str format, SymInt k, Tensor indices) -> Tensor[]")
for _name in ("cpu_linear", "rows"):
    _library.impl(_name, _later("cpu.target", _name), "CompositeImplicitAutograd")

_library.define("fused(Tensor[] inputs, str spec) -> Tensor[]")
_library.impl("fused", _later("fused", "fused"), "CUDA")
# On CPU tensors until the operator in C++ is built and takes its place (`codegen/cpp/build.py`).
_library.impl("fused", _later("fused", "build_for_cpu"), "CompositeExplicitAutograd")
torch.library.register_fake("bitfold::fused", _later("fused", "fake"), lib=_library)
torch.library.register_autograd(
    "bitfold::fused", _later("fused", "backward"), setup_context=_later("fused", "keep"), lib=_library
)

_library.define("fused_beside(Tensor[] inputs, str specs) -> Tensor[]")
_library.impl("fused_beside", _later("cpu.beside", "build_for_cpu"), "CompositeExplicitAutograd")
torch.library.register_fake("bitfold::fused_beside", _later("cpu.beside", "beside_fake"), lib=_library)

_library.define("few_queries(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")
_library.impl("few_queries", _later("kv_cache.few_queries", "build_for_cpu"), "CompositeExplicitAutograd")
torch.library.register_fake("bitfold::few_queries", _later("kv_cache.few_queries", "fake"), lib=_library)

_library.define("conv(Tensor[] inputs, str spec) -> Tensor[]")
_library.impl("conv", _later("cpu.conv", "build_for_cpu"), "CompositeExplicitAutograd")
torch.library.register_fake("bitfold::conv", _later("cpu.conv", "fake"), lib=_library)
torch.library.register_autograd(
    "bitfold::conv", _later("cpu.conv", "backward"), setup_context=_later("cpu.conv", "keep"), lib=_library
)

_library.define(
    "cache_write(Tensor(a!)[] cache, Tensor k, Tensor v, Tensor positions, Tensor? pages, str spec) -> ()"
)
_library.define(
    "attend(Tensor q, Tensor[] cache, Tensor limits, Tensor? mask, Tensor? pages, str spec) -> Tensor"
)
_library.define(
    "attend_few(Tensor q, Tensor[] cache, Tensor limits, Tensor? mask, Tensor? pages, str spec) -> Tensor"
)
_library.impl("attend_few", _later("kv_cache.attention", "build_for_cpu"), "CompositeExplicitAutograd")
torch.library.register_fake("bitfold::attend_few", _later("kv_cache.attention", "attend_fake"), lib=_library)
for _name in ("cache_write", "attend"):
    _library.impl(_name, _later("kv_cache.attention", _name), "CUDA")
    _library.impl(_name, _later("kv_cache.attention", f"{_name}_on_cpu"), "CPU")
    torch.library.register_fake(
        f"bitfold::{_name}", _later("kv_cache.attention", f"{_name}_fake"), lib=_library
    )
_library.define("no_cache_gradient(Tensor gradient) -> Tensor")
_library.impl(
    "no_cache_gradient", _later("kv_cache.attention", "no_cache_gradient"), "CompositeExplicitAutograd"
)
_library.impl("no_cache_gradient", _later("kv_cache.attention", "no_cache_gradient_shape"), "Meta")
torch.library.register_autograd(
    "bitfold::attend",
    _later("kv_cache.attention", "backward"),
    setup_context=_later("kv_cache.attention", "keep"),
    lib=_library,
)

# Defined, with their reference, in formats/round_groups.py.
for _name, _function in (("round_groups", "rounded"), ("round_groups_backward", "gradients")):
    _library.impl(_name, _later("cuda.rounding", _function), "CUDA")
KERNELS["cuda"] = _later("cuda.rounding", "has_kernel")

# torch.vmap; operators that write have no rule.
torch.library.register_vmap("bitfold::fused", _later("fused", "mapped"), lib=_library)
for _name in ("cpu_linear", "rows", "fused_beside", "few_queries", "conv", "attend", "attend_few"):
    torch.library.register_vmap(
        f"bitfold::{_name}", one_by_one(getattr(torch.ops.bitfold, _name).default), lib=_library
    )
