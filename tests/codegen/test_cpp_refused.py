"""What CPU kernels do not compute, and calls that are wrong: each is one sentence."""

from __future__ import annotations

import ctypes
import warnings

import pytest
import torch
from cpp_cases import check, operands, pair

from bitfold.codegen import CodegenError, GemmSpec
from bitfold.codegen.cpp import build
from bitfold.codegen.cpp.known import Kernels
from bitfold.codegen.cpp.support import cpu_layout, obstacle
from bitfold.codegen.epilogue import Epilogue
from bitfold.formats import format

NO_KERNELS = [
    ("grouped 4 32x64 f32 int8[bytes]", "have no experts"),
    ("linear 32x64 f32 float8_e4m3fn[bytes] x:int8", "by integers, not by float8_e4m3fn"),
    ("linear 32x64 f32 int8[bytes] x:float8_e4m3fn", "multiply int8, not activations"),
    ("linear 32x64 f32 int4[packed]", "slices of 1 codes"),
    ("linear 32x192 f32 uint4[g96,zero,planar64] x:int8[g64,f32]", "do not divide each other"),
    ("linear 4x70016 f32 int8[bytes] x:int8", "may not fit in 32 bits"),
]


@pytest.fixture(scope="session")
def compiled() -> None:
    """A kernel, and so the operator."""
    build.know([pair("int8")])


@pytest.mark.parametrize(("text", "says"), NO_KERNELS)
def test_what_no_kernel_computes(text: str, says: str) -> None:
    spec = GemmSpec.parse(text)
    assert says in (obstacle(spec) or "")
    with pytest.raises(CodegenError, match="no CPU kernel"):
        from bitfold.lowering.fused import build_for_cpu

        build_for_cpu([torch.zeros(1, 64)], text)


@pytest.mark.parametrize(("text", "says"), NO_KERNELS)
def test_the_operator_does_not_compute_it_either(compiled: None, text: str, says: str) -> None:
    """Once it is there, it builds what it does not know: the reason is the error's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=f"^no CPU kernel computes .*{says}"):
            torch.ops.bitfold.fused([torch.zeros(1, 64)], text)


@pytest.mark.parametrize("extras", [8, 9, 14])
def test_tensors_that_an_epilogue_reads(extras: int) -> None:
    """Each has a place in the call, of which there are eight."""
    end = "y0"
    for i in range(extras):
        end = f"add({end},{'ev'[i % 2]}{i // 2})"
    f = cpu_layout(format("int8"), 64)
    assert f is not None
    if extras > 8:
        with pytest.raises(CodegenError, match=f"at most 8 tensors beside its sums, not {extras}"):
            GemmSpec(f, 16, 64, "f32", epilogue=Epilogue.parse(end))
        return
    for m in (1, 33):
        check(GemmSpec(f, 16, 64, "f32", epilogue=Epilogue.parse(end)), m)


def test_wrong_operands_are_refused(compiled: None) -> None:
    spec = pair("int8")
    inputs = operands(spec, 2, 0)
    op = torch.ops.bitfold.fused
    for wrong, says in (
        (inputs[:2], "takes 3 tensors, not 2"),
        ([inputs[0][:, :-1], *inputs[1:]], r"takes x \[.., "),
        ([inputs[0].double(), *inputs[1:]], "does not take x in this dtype"),
        ([inputs[0], inputs[1][:-1], inputs[2]], "rows of"),
        ([inputs[0], inputs[1].long(), inputs[2]], "rows of .* bytes"),
        ([inputs[0], inputs[1], inputs[2][:-1]], "reads .* scales"),
        ([inputs[0], inputs[1], inputs[2].double()], "in the dtype that its format stores"),
        ([inputs[0], inputs[1], inputs[2].half()], "in the dtype that its format stores"),
        ([inputs[0].bfloat16(), *inputs[1:]], "does not take x in this dtype"),
    ):
        with pytest.raises(RuntimeError, match=says):
            op(wrong, str(spec))


@pytest.mark.parametrize(
    ("count", "tensors", "says"), [(5, 5, "at most 4 products"), (2, 3, "take 5 tensors, not 7")]
)
def test_calls_beside_one_another_are_counted(compiled: None, count: int, tensors: int, says: str) -> None:
    spec = pair("int8")
    x, *parts = operands(spec, 2, 0)
    with pytest.raises(RuntimeError, match=says):
        torch.ops.bitfold.fused_beside([x, *parts * tensors], " & ".join([str(spec)] * count))


def test_facts_of_another_size_are_refused(compiled: None) -> None:
    """The operator would read past them."""

    class Short(ctypes.Structure):
        _fields_ = [("run", ctypes.c_void_p)]

    kernels = Kernels(
        "runtime",
        Short,
        parse=GemmSpec.parse,
        library=build.library_of,
        entries=lambda loaded: {},
        told=lambda spec, entries: Short(),
    )
    with pytest.raises(CodegenError, match="bytes for each kernel and is told 8: the two do not list"):
        kernels.loaded()
    x = operands(pair("int8"), 1, seed=0)
    assert torch.ops.bitfold.fused(x, str(pair("int8")))[0].shape == (1, pair("int8").n)
