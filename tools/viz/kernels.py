"""The generated kernel behind a node: its source, its schedule, what the compiler made of it, its roof.

In: a node of a lowered graph that calls a generated kernel, the shape of x, where it runs. Out: a `Kernel`.

    bitfold.fused([x, codes, scales], "linear 4096x4096 bf16 int4[g128,halves256]"), [1, 4096], an H200
    ->  Kernel(spec=..., language="Triton", schedule="m8 n64 w2 s3 k4 sum", source="...",
               facts={"rows": 1, "registers of a thread": 96, ...}, ...)

For a GPU nothing needs to be there: the source is text, and registers come from compiling for its
architecture."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...codegen import CodegenError, GemmSpec, choose
from ...codegen.attention import AttentionSpec
from ...codegen.attention_schedule import choose_attention
from ...codegen.choose import alone
from ...codegen.conv import ConvSpec
from ...codegen.pipelined import Pipelined
from ...lowering.cpu.beside import BETWEEN

FUSED = torch.ops.bitfold.fused.default
BESIDE = torch.ops.bitfold.fused_beside.default
CONV = torch.ops.bitfold.conv.default
ATTEND = (torch.ops.bitfold.attend.default, torch.ops.bitfold.attend_few.default)


@dataclass(frozen=True)
class Kernel:
    """spec: the text that regenerates it; schedule: "" where there is none to choose; source: its file's
    text; facts: by name what the compiler says; note: why something of this is not there."""

    spec: str
    language: str
    schedule: str
    source: str
    facts: Mapping[str, int | str] = field(default_factory=dict)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Without the source, which kernels share."""
        return {
            "spec": self.spec,
            "language": self.language,
            "schedule": self.schedule,
            "facts": dict(self.facts),
            "note": self.note,
        }


def kernel_of(
    node: Node, *, read: tuple[int, ...], gpu: int | None = None, compiled: bool = True
) -> Kernel | None:
    """The kernel that `node` calls, None if it calls none that is generated.

    read: shape of x (of the queries of an attention), in the call that is looked at. gpu: compute capability
    (90 for 9.0), None for this processor. compiled: whether to compile for a GPU, a second for each kernel,
    to learn of registers.
    """
    if node.op != "call_function":
        return None
    text = str(node.args[-1])
    if node.target is FUSED:
        if gpu is None:
            return _on_cpu(text, "gemm")
        spec = GemmSpec.parse(text)
        return _gemm_on_gpu(spec, max(1, prod(read) // spec.k), gpu, compiled)
    if node.target is BESIDE:
        return _on_cpu(text, "gemm")
    if node.target is CONV:
        return _on_cpu(text, "conv")
    if node.target in ATTEND:
        queries = read[2] if len(read) == 4 else 1
        return _on_cpu(text, "attention") if gpu is None else _attention_on_gpu(text, queries, gpu, compiled)
    return None


def example_shape(node: Node) -> tuple[int, ...]:
    """Of the first tensor that a node reads, as its graph was captured; a size that varies has the example's,
    or 1."""
    first = next(iter(node.all_input_nodes), None)
    value = None if first is None else first.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    return tuple(size if isinstance(size, int) else size.node.hint or 1 for size in value.shape)


@lru_cache(maxsize=1024)
def _on_cpu(text: str, kind: str) -> Kernel:
    from ...codegen.cpp.vectors import widest

    return Kernel(text, "C++", "", _cpp(text, kind), {"vectors": widest().name})


def _cpp(text: str, kind: str) -> str:
    from ...codegen.cpp.attention import source as attention
    from ...codegen.cpp.conv_source import source as conv
    from ...codegen.cpp.source import source as gemm

    if kind == "conv":
        return conv(ConvSpec.parse(text))
    if kind == "attention":
        return attention(AttentionSpec.parse(text))
    return "\n".join(dict.fromkeys(gemm(GemmSpec.parse(one)) for one in text.split(BETWEEN)))


@lru_cache(maxsize=1024)
def _gemm_on_gpu(spec: GemmSpec, rows: int, arch: int, compiled: bool) -> Kernel:
    from ...codegen.triton.pipelined import pipelined_source
    from ...codegen.triton.source import source

    product, schedule, note = spec, choose(spec, rows), ""
    if schedule is None and not spec.epilogue.plain:
        # As `lowering/fused.py` runs it: products first, and what stands behind them at once.
        product = alone(spec)
        schedule = choose(product, rows)
        times = f"{spec.weights} times, " if spec.weights > 1 else ""
        note = f"{times}then what stands behind the product in a kernel of its own"
    if schedule is None:
        told = f"at {rows} rows the weight is decoded, and the library multiplies"
        return Kernel(str(spec), "library", "", "", {"rows": rows}, told)
    language = "Triton, pipelined" if isinstance(schedule, Pipelined) else "Triton"
    if isinstance(schedule, Pipelined):
        text = pipelined_source(product, schedule)
    else:
        text = source(product, schedule)
    made = Kernel(str(spec), language, str(schedule), text, {"rows": rows}, note)
    return _with_facts(made, lambda: _gemm_facts(product, schedule, arch)) if compiled else made


def _gemm_facts(spec: GemmSpec, schedule: Any, arch: int) -> Any:
    from ...codegen.triton.inspect import inspect
    from ...codegen.triton.pipelined_inspect import inspect_pipelined

    if isinstance(schedule, Pipelined):
        return inspect_pipelined(spec, schedule)
    return inspect(spec, schedule, arch)


@lru_cache(maxsize=256)
def _attention_on_gpu(text: str, queries: int, arch: int, compiled: bool) -> Kernel:
    from ...codegen.triton.attention import source
    from ...codegen.triton.attention_inspect import inspect_attention

    spec = AttentionSpec.parse(text)
    schedule = choose_attention(spec, queries)
    made = Kernel(text, "Triton", str(schedule), source(spec, schedule), {"queries": queries})
    return _with_facts(made, lambda: inspect_attention(spec, schedule, arch)) if compiled else made


def _with_facts(made: Kernel, ask: Callable[[], Any]) -> Kernel:
    """The kernel with what the compiler told; with the reason where it could not be asked."""
    try:
        told = ask()
    except (ImportError, FileNotFoundError, subprocess.CalledProcessError, CodegenError) as error:
        unknown = f"registers are not known: {str(error).splitlines()[0]}"
        return replace(made, note="; ".join(filter(None, (made.note, unknown))))
    compiled = {
        "registers of a thread": told.registers,
        "spilled bytes of a thread": told.spills,
        "shared memory of a program, bytes": told.shared,
    }
    return replace(made, facts={**made.facts, **compiled})
