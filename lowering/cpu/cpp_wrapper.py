"""How Inductor is told to write C++ between kernels, and to call bitfold's operators there without torch's
dispatcher.

In: nothing. Out: Inductor's options for a graph whose kernels are small.

    buf2 = torch.ops.bitfold.fused.default([buf1, arg7, arg8], "linear ..")
    ->  aoti_torch_cpu_fused({buf1, arg7, arg8}, 3, "linear ..", &buf2)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from ...codegen.spec import MOST_EXTRAS


class _Shims(dict[Any, list[str]]):
    """Pickled by name: Inductor's cache of graphs goes by the options' pickle, and an operator has none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _shims, ()


def _shims() -> _Shims:
    return SHIMS


# Operator -> the C function that Inductor's C++ calls, as torch's own are called; `codegen/cpp/headers`.
SHIMS = _Shims(
    {
        torch.ops.bitfold.fused.default: [
            "AOTITorchError aoti_torch_cpu_fused(const AtenTensorHandle*, int64_t, const char*, "
            "AtenTensorHandle*)"
        ],
        torch.ops.bitfold.fused_beside.default: [
            "AOTITorchError aoti_torch_cpu_fused_beside(const AtenTensorHandle*, int64_t, const char*, ...)"
        ],
        torch.ops.bitfold.few_queries.default: [
            "AOTITorchError aoti_torch_cpu_few_queries(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, "
            "AtenTensorHandle*, double, AtenTensorHandle*)"
        ],
        torch.ops.bitfold.attend_few.default: [
            "AOTITorchError aoti_torch_cpu_attend_few(AtenTensorHandle, const AtenTensorHandle*, int64_t, "
            "AtenTensorHandle, AtenTensorHandle*, AtenTensorHandle*, const char*, AtenTensorHandle*)"
        ],
        torch.ops.bitfold.conv.default: [
            "AOTITorchError aoti_torch_cpu_conv(const AtenTensorHandle*, int64_t, const char*, "
            "AtenTensorHandle*" + ", AtenTensorHandle* = nullptr" * (MOST_EXTRAS - 1) + ")"
        ],
    }
)


def options_for(gm: GraphModule) -> dict[str, Any]:
    """Options of Inductor for this graph; none if it calls an operator that C++ cannot.

    An operator without a C function is called through Python there, and if it gives a list of one tensor,
    Inductor 2.11 to 2.14 takes the list for the tensor: the process dies.
    """
    if any(_lists(node.target) for node in gm.graph.nodes if node.target not in SHIMS):
        return {}
    # Dynamo's guards say the sizes of what is given; an assertion makes a stream for its message.
    told = {"size_asserts": False, "alignment_asserts": False}
    return {"cpp_wrapper": True, "aot_inductor.custom_ops_to_c_shims": SHIMS, **told}


def _lists(target: object) -> bool:
    """Whether it is an operator of ours that gives a list, and no other operators take its place."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "bitfold":
        return False
    listed = any(str(one.type) == "List[Tensor]" for one in target._schema.returns)
    return listed and not target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
