"""The generated kernel behind a node: its source, its schedule, what the compiler made of it, its roof.

In: a node of a lowered graph that calls a generated kernel, the rows of x, where it runs. Out: a `Kernel`.

    bitfold.fused([x, codes, scales], "linear 4096x4096 bf16 int4[g128,halves256]"), 1 row, an H200
    ->  Kernel(spec=..., language="Triton", schedule="m8 n64 w2 s3 k4 sum", source="...",
               facts={"registers": 96, "spilled bytes": 0, "shared memory, bytes": 24576}, ...)

For a GPU nothing needs to be there: the source is text, and registers come from compiling for its
architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node

from ...codegen import CodegenError, GemmSpec, choose
from ...codegen.attention import AttentionSpec
from ...codegen.attention_schedule import choose_attention
from ...codegen.conv import ConvSpec
from ...codegen.pipelined import Pipelined

FUSED = torch.ops.bitfold.fused.default
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


def kernel_of(node: Node, *, rows: int, gpu: int | None = None, compiled: bool = True) -> Kernel | None:
    """The kernel that `node` calls, None if it calls none that is generated.

    rows: of x, in the call that is looked at. gpu: compute capability (90 for 9.0), None for this processor.
    compiled: whether to compile for a GPU, a second for each kernel, to learn of registers.
    """
    if node.op != "call_function":
        return None
    text = str(node.args[-1])
    if node.target is FUSED:
        return _gemm_on_gpu(text, rows, gpu, compiled) if gpu else _on_cpu(text, "gemm")
    if node.target is CONV:
        return _on_cpu(text, "conv")
    if node.target in ATTEND:
        return _attention_on_gpu(text, rows, gpu, compiled) if gpu else _on_cpu(text, "attention")
    return None


@lru_cache(maxsize=1024)
def _on_cpu(text: str, kind: str) -> Kernel:
    from ...codegen.cpp.build import vectors

    return Kernel(text, "C++", "", _cpp(text, kind), {"vectors": vectors()})


def _cpp(text: str, kind: str) -> str:
    from ...codegen.cpp.attention import source as attention
    from ...codegen.cpp.conv_source import source as conv
    from ...codegen.cpp.source import source as gemm

    if kind == "conv":
        return conv(ConvSpec.parse(text))
    return attention(AttentionSpec.parse(text)) if kind == "attention" else gemm(GemmSpec.parse(text))


@lru_cache(maxsize=1024)
def _gemm_on_gpu(text: str, rows: int, arch: int, compiled: bool) -> Kernel:
    from ...codegen.triton.pipelined import pipelined_source
    from ...codegen.triton.source import source

    spec = GemmSpec.parse(text)
    schedule = choose(spec, rows)
    if schedule is None:
        return Kernel(
            text, "library", "", "", note=f"at {rows} rows the weight is decoded, and the library multiplies"
        )
    if isinstance(schedule, Pipelined):
        made = Kernel(text, "Triton, pipelined", str(schedule), pipelined_source(spec, schedule))
    else:
        made = Kernel(text, "Triton", str(schedule), source(spec, schedule))
    return _with_facts(made, lambda: _gemm_facts(spec, schedule, arch)) if compiled else made


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
    made = Kernel(text, "Triton", str(schedule), source(spec, schedule))
    return _with_facts(made, lambda: inspect_attention(spec, schedule, arch)) if compiled else made


def _with_facts(made: Kernel, ask: Callable[[], Any]) -> Kernel:
    """The kernel with what the compiler told; with the reason where it could not be asked."""
    try:
        told = ask()
    except (ImportError, FileNotFoundError, CodegenError) as error:
        note = f"registers are not known: {str(error).splitlines()[0]}"
        return Kernel(made.spec, made.language, made.schedule, made.source, note=note)
    facts = {
        "registers of a thread": told.registers,
        "spilled bytes of a thread": told.spills,
        "shared memory of a program, bytes": told.shared,
    }
    return Kernel(made.spec, made.language, made.schedule, made.source, facts)
