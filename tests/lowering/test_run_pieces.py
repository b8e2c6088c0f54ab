"""Pieces that are C++ inside run without Python in between from the second call on, with the same numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from test_repeats import WIDE, Layer, Tower
from torch import Tensor

import bitfold as bf
from bitfold.codegen import CodegenError, GemmSpec
from bitfold.codegen.cpp import sequence_build
from bitfold.codegen.cpp.build import know
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.lowering import backend
from bitfold.lowering.cpu import repeats, run_pieces
from bitfold.lowering.cpu.cpp_wrapper import SHIMS
from bitfold.lowering.cpu.entries import entry
from bitfold.lowering.cpu.run_pieces import Run, Step

pytestmark = pytest.mark.skipif(bool(bf.get_target("cpu").missing()), reason="there is no C++ compiler")


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """Those that are made."""
    made: list[Run] = []

    def keep(*args: Any) -> Run:
        made.append(Run(*args))
        return made[-1]

    torch._dynamo.reset()
    with mock.patch.object(repeats, "Run", keep):
        yield made


def pair() -> tuple[Any, Any, Tensor, Tensor]:
    """A compiled tower, the same by the reference, inputs."""
    torch.manual_seed(0)
    tower, x, shift = Tower([Layer() for _ in range(4)]).eval(), torch.randn(4, WIDE), torch.randn(WIDE)
    right = Tower([Layer() for _ in range(4)]).eval()
    right.load_state_dict(tower.state_dict())
    fast = torch.compile(tower, backend=backend.bitfold, options={"recipe": "int8"})
    slow = torch.compile(right, backend=backend.bitfold, options={"recipe": "int8", "target": "reference"})
    return fast, slow, x, shift


def test_layers_are_one_call(runs: list[Run]) -> None:
    fast, slow, x, shift = pair()
    with torch.inference_mode():
        for call in range(4):
            # Sines of what four layers add up: a last bit in the first grows by some tens.
            torch.testing.assert_close(fast(x, shift), slow(x, shift), rtol=1e-4, atol=1e-4)
            (run,) = runs
            assert len(run.steps) < 6 and not run.first, call
            # Of 4 layers, what is read later: the last one's result, and that of the one that is returned.
            assert max(len(step.given) for step in run.steps) > 8
    ours, theirs = fast._orig_mod.layers, slow._orig_mod.layers
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.seen, b.seen, rtol=1e-4, atol=1e-4)


def test_what_is_written_to_has_another_version(runs: list[Run]) -> None:
    """Or autograd would take what it saved for unchanged."""
    fast, _, x, shift = pair()
    seen = [layer.seen for layer in fast._orig_mod.layers]
    with torch.no_grad():
        for _ in range(3):
            before = [buffer._version for buffer in seen]
            fast(x, shift)
            assert all(buffer._version > was for buffer, was in zip(seen, before, strict=True))
    assert len(runs) == 1


def test_wrong_sizes_are_not_read(runs: list[Run]) -> None:
    """C++ asserts no sizes: Dynamo's guards do, and other sizes are another graph."""
    fast, slow, _, shift = pair()
    with torch.inference_mode():
        for rows in (4, 4, 7, 7, 4):
            given = torch.randn(rows, WIDE)
            torch.testing.assert_close(fast(given, shift), slow(given, shift), rtol=1e-3, atol=1e-3)


def test_without_the_caller_it_goes_on_in_python(runs: list[Run]) -> None:
    """And says so, once."""
    why = "fatal error: Python.h: No such file or directory"
    refuse = mock.Mock(side_effect=CodegenError(why))
    run_pieces._say_once.cache_clear()
    with mock.patch.object(run_pieces, "sequence", refuse), pytest.warns(UserWarning) as said:
        fast, slow, x, shift = pair()
        with torch.inference_mode():
            for _ in range(3):
                torch.testing.assert_close(fast(x, shift), slow(x, shift), rtol=1e-4, atol=1e-4)
        run_pieces._say_once(why)  # another graph's
    assert refuse.called and len(runs[0].steps) == 6
    assert [str(one.message) for one in said if "one by one" in str(one.message)] == [
        "layers are called from Python one by one, which takes longer than calling them from C++ (there is "
        "no Python.h; install Python's headers, python3-dev)"
    ]


def test_a_caller_that_the_compiler_refuses_is_compiled_once() -> None:
    library = mock.Mock(side_effect=CodegenError("refused"))
    sequence_build._caller.cache_clear()
    try:
        with mock.patch.object(sequence_build, "Library", library):
            for _ in range(2):
                with pytest.raises(CodegenError, match="refused"):
                    sequence_build.sequence([sequence_build.Native(1, (0,), (1,))], 1, [1])
        assert library.call_count == 1
    finally:
        sequence_build._caller.cache_clear()


def test_an_operators_words_are_raised_behind_inductors_code() -> None:
    """What it refuses, and not that a call failed."""
    laid_out = cpu_layout(bf.format("int8"), 64)
    assert laid_out is not None
    spec = GemmSpec(laid_out, 32, 64, "f32")
    q = laid_out.quantize(torch.randn(32, 64))
    halves = [q.parts[0], *(part.half() for part in q.parts[1:])]

    def compiled(gm: Any, examples: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        patches = {"cpp_wrapper": True, "aot_inductor.custom_ops_to_c_shims": SHIMS}
        return compile_fx(gm, examples, config_patches=patches)

    def call(x: Tensor, *parts: Tensor) -> Tensor:
        y: Tensor = torch.ops.bitfold.fused([x + 1, *parts], str(spec))[0]
        return y * 2

    torch._dynamo.reset()
    know([spec])
    fast, x = torch.compile(call, backend=compiled), torch.randn(3, 64)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x, *q.parts), call(x, *q.parts))
        with pytest.raises(RuntimeError, match="reads 32 scales, in the dtype that its format stores"):
            fast(x, *halves)


def test_a_function_of_python_has_no_entry() -> None:
    x = torch.ones(3)
    results, found = entry(lambda given: (given + 1,), (x,))
    assert not found and torch.equal(results[0], x + 1)


def test_results_that_are_arguments_have_no_entry() -> None:
    """Torch restores those itself; Inductor's function gives none."""
    torch._dynamo.reset()
    kept: list[Any] = []

    def keep(gm: Any, examples: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        kept.append(compile_fx(gm, examples, config_patches={"cpp_wrapper": True}))
        return kept[-1]

    with torch.inference_mode():
        torch.compile(lambda x: (x.view(-1), x.sin()), backend=keep)(torch.ones(2, 3))
        results, found = entry(kept[0], (torch.ones(2, 3),))
    assert not found and len(results) == 2


def test_other_threads_calls_are_not_this_ones(runs: list[Run]) -> None:
    fast, _, x, shift = pair()
    found: list[Any] = []

    def work() -> None:
        with torch.inference_mode():
            for _ in range(5):
                found.append(fast(x, shift)[0])

    with torch.inference_mode():
        fast(x, shift)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15 and all(one.isfinite().all() for one in found)


def test_values_are_let_go() -> None:
    x = torch.ones(2)
    step = Step(lambda a: (a + 1,), (0,), (1,))
    run = Run([step, Step(lambda a: (a * 2,), (1,), (2,))], [2])
    for _ in range(2):
        assert run(x) == (2,)  # no places: what is returned is no value
        assert set(run.steps[1].gone) == {1, 2}


def test_an_error_in_a_step_is_raised() -> None:
    """Of a C function: here one that takes nothing and gives nothing, though a result is wanted."""
    import ctypes

    called = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda given, made: None)
    address = ctypes.cast(called, ctypes.c_void_p).value
    assert address is not None
    run = sequence_build.sequence([sequence_build.Native(address, (), (1,))], 1, [1])
    with pytest.raises(RuntimeError, match="handle"):
        run([torch.ones(2)])
