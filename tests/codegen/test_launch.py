"""What surrounds a launch: operands that are none, files of generated modules, the grid."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfold.codegen import CodegenError, GemmSpec, Schedule, choose
from bitfold.codegen.choose import alone
from bitfold.codegen.epilogue import Epilogue
from bitfold.codegen.pipelined import Pipelined, parsed
from bitfold.codegen.triton import build, pipelined_build, run
from bitfold.codegen.triton import locks as locks_module
from bitfold.formats import format

SPEC = GemmSpec(format("int4[g64,halves256]"), 32, 256)


def operands(**changed: Any) -> list[torch.Tensor]:
    """x, codes and scales, and what else is named."""
    codes, scales = SPEC.weight.quantize(torch.randn(32, 256)).parts
    given = {"x": torch.zeros(3, 256, dtype=torch.bfloat16), "codes": codes, "scales": scales}
    return list((given | changed).values())


def refused(match: str, spec: GemmSpec = SPEC, **changed: Any) -> None:
    with pytest.raises(CodegenError, match=match):
        build.check(spec, operands(**changed))


def test_operands_that_fit() -> None:
    build.check(SPEC, operands())
    build.check(SPEC, operands(x=torch.zeros(0, 256, dtype=torch.bfloat16)))
    build.check(SPEC, operands(x=torch.zeros(3, 300, dtype=torch.bfloat16)[:, :256]))


def test_operands_that_do_not() -> None:
    half = torch.bfloat16
    for x in (torch.zeros(3, 255, dtype=half), torch.zeros(256, dtype=half), torch.zeros(3, 256)):
        refused(r"takes x \[M, 256\] in torch.bfloat16, not", x=x)
    refused(r"call x.contiguous\(\) before the kernel", x=torch.zeros(256, 3, dtype=half).T)
    refused("takes 3 tensors, not 4", bias=torch.zeros(32, dtype=half))
    refused("takes 4 tensors, not 3", spec=GemmSpec(SPEC.weight, 32, 256, bias=True))
    _, codes, _ = operands()
    wide = torch.cat([codes, codes], -1)
    refused("contiguous and start at a multiple of 16 bytes", codes=wide[:, : codes.shape[1]])
    shifted = torch.cat([codes.flatten(), codes.flatten()])[1 : 1 + codes.numel()].view(codes.shape)
    refused("contiguous and start at a multiple of 16 bytes", codes=shifted)
    refused("reads 32 rows of 128 bytes of codes, not", codes=codes[:16])
    many = torch.zeros(1, 256, dtype=half).expand(2**23, 256)
    refused("is past 32-bit addresses; split it along its rows", x=many)


def test_the_grid() -> None:
    schedule = Schedule(16, 64, split=3, scale="sum")
    assert build.grid(GemmSpec(SPEC.weight, 65, 256), schedule, 17) == (2, 3, 2)
    assert build.grid(GemmSpec(SPEC.weight, 64, 256), schedule, 1) == (1, 3, 1)


def test_the_grid_of_experts_has_a_block_more_for_each() -> None:
    spec = GemmSpec(SPEC.weight, 64, 256, experts=8)
    assert build.grid(spec, Schedule(16, 64, scale="sum"), 40) == (1, 1, 3 + 7)
    assert build.grid(spec, Schedule(16, 64, scale="sum"), 2) == (1, 1, 2)


def test_what_comes_beside_the_weight_is_checked() -> None:
    spec = GemmSpec(SPEC.weight, 32, 256, epilogue=Epilogue.parse("add(y0,e0)"))
    build.check(spec, operands(e0=torch.zeros(3, 32, dtype=torch.bfloat16)))
    for wrong in (torch.zeros(3, 31), torch.zeros(3, 32), torch.zeros(32, 3, dtype=torch.bfloat16).T):
        refused(r"reads a contiguous tensor \(3, 32\) in torch.bfloat16", spec, e0=wrong)
    codes = format("int8").quantize(torch.randn(3, 256))
    spec = GemmSpec(format("int4[g64,planar256]"), 32, 256, activation=codes.format)
    weight = spec.weight.quantize(torch.randn(32, 256)).parts
    build.check(spec, [*codes.parts, *weight])
    with pytest.raises(CodegenError, match="reads 3 scales of x"):
        build.check(spec, [codes.codes, torch.ones(2, 1), *weight])
    with pytest.raises(CodegenError, match=r"in torch.uint8, not .* in torch.float32"):
        build.check(spec, [torch.zeros(3, 256), codes.parts[1], *weight])


def test_no_rows_launch_nothing() -> None:
    """Nor compile anything: this runs where there is no GPU."""
    y = build.launch(
        SPEC, Schedule(16, 16, scale="sum"), operands(x=torch.zeros(0, 256, dtype=torch.bfloat16))
    )
    assert y.shape == (0, 32) and y.dtype == torch.bfloat16


def test_a_module_is_written_once_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "folder", lambda: tmp_path / "made")
    build.module.cache_clear()
    text = '"""A module."""\nkernel = 7\n'
    assert build.module(text).kernel == 7
    (path,) = (tmp_path / "made").glob("*.py")
    written = path.stat().st_mtime_ns
    build.module.cache_clear()
    assert build.module(text).kernel == 7 and path.stat().st_mtime_ns == written
    path.write_text("kernel = 8\n")  # cut short, or another version's
    build.module.cache_clear()
    assert build.module(text).kernel == 7 and path.read_text() == text
    assert not list((tmp_path / "made").glob("*.tmp"))
    build.module.cache_clear()


def test_importing_starts_no_compiler() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import bitfold.codegen.triton.build; "
        "print(before == ('triton' in sys.modules))"
    )
    search = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=search)
    assert told.stdout == "True\n", told.stderr


def test_counters_of_captured_calls_begin_at_lines_of_the_cache() -> None:
    """Or a kernel would be compiled anew for each alignment, in the middle of a capture."""
    arena = locks_module._Arena(torch.zeros(4096, dtype=torch.int32))
    found = [arena.take(count) for count in (65, 1, 448, 33)]
    assert all(one is not None and one.storage_offset() % locks_module.LINE == 0 for one in found)
    assert arena.take(4096) is None


def test_calls_of_one_captured_graph_share_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other graphs and of other streams of it have their own; without a driver's word each call."""
    device, now = torch.device("cuda", 0), {"graph": 7, "stream": 1}
    arena = locks_module._Arena(torch.zeros(1 << 15, dtype=torch.int32))
    monkeypatch.setitem(locks_module._arenas, device, arena)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": now["stream"]})
    )
    monkeypatch.setattr(locks_module, "capture_of", lambda stream: now["graph"])

    def place(count: int) -> int:
        found = locks_module.locks(device, count)
        assert found.numel() == count
        return found.storage_offset()

    first = place(448)
    assert place(64) == first and place(locks_module.OF_GRAPH) == first
    larger = place(locks_module.OF_GRAPH + 1)
    assert larger != first and place(448) == larger
    now["stream"] = 2
    other = place(448)
    now["graph"] = 8
    assert len({larger, other, place(448)}) == 3
    monkeypatch.setattr(locks_module, "capture_of", lambda stream: None)
    assert place(448) != place(448)


def test_the_first_call_sets_counters_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each captured call after it would zero its own, by a kernel that takes a microsecond and more."""
    device, capturing = torch.device("cuda", 0), [True]
    made = locks_module._Arena(torch.zeros(1 << 15, dtype=torch.int32))
    monkeypatch.setattr(locks_module, "_arenas", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 1}))
    monkeypatch.setattr(locks_module, "reserve", lambda device: locks_module._arenas.update({device: made}))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: zeros(*a, dtype=k["dtype"]))
    assert locks_module.locks(device, 8).untyped_storage() is not made.memory.untyped_storage()
    capturing[0] = False
    assert locks_module.locks(device, 8).data_ptr() == made.memory.data_ptr()


def test_without_a_driver_no_capture_is_known() -> None:
    if not torch.cuda.is_available():
        locks_module._driver.cache_clear()
        assert locks_module.capture_of(0) is None


def pipelined(n: int = 512, k: int = 256) -> tuple[GemmSpec, list[torch.Tensor], torch.Tensor]:
    spec = GemmSpec(format("int4[g128,halves256]"), n, k)
    return spec, spec.weight.quantize(torch.randn(n, k)).parts, torch.randn(64, k).bfloat16()


def test_what_the_copy_engine_cannot_take_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """x that begins or whose rows begin off 16 bytes: the kernel gets a copy of it."""
    spec, parts, x = pipelined()
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(pipelined_build, "launch", lambda spec, s, x, *_, **__: seen.append(x) or x)
    plan = parsed("tma m64 n128 g2 w4 x4 j2 c4 p1 lane")
    memory = torch.randn(64 * 257 + 1).bfloat16()
    for given in (x, memory[1 : 1 + 64 * 256].view(64, 256), memory[: 64 * 257].view(64, 257)[:, :256]):
        run.run(spec, plan, [given, *parts])
        assert pipelined_build.aligned(seen[-1]) and torch.equal(seen[-1], given)
    assert seen[0] is x
    with pytest.raises(CodegenError, match="codes"):
        run.run(spec, plan, [x, parts[0][:128], parts[1]])


def test_what_a_pipelined_launch_refuses() -> None:
    spec, parts, x = pipelined()
    y = torch.empty(64, 512).bfloat16()
    for out, said in ((y[:8], r"writes y \[64, 512\]"), (y.float(), "in bf16"), (y[:, :256], r"\[64, 512\]")):
        with pytest.raises(CodegenError, match=said):
            pipelined_build.check(spec, x, parts, out)
    with pytest.raises(CodegenError, match="codes of 512 rows, not of 128"):
        pipelined_build.check(spec, x, [parts[0][:128], parts[1]], y)


def test_an_epilogue_is_put_behind_pipelined_products() -> None:
    """They have none of their own; the choice says that products come first."""
    spec = GemmSpec.parse("linear 28672x4096 bf16 2*int4[g128,halves256] -> mul(silu(y0),y1)")
    assert isinstance(choose(alone(spec), 128), Pipelined) and choose(spec, 128) is None
    assert isinstance(choose(spec, 1), Schedule)
    assert str(alone(spec)) == "linear 28672x4096 bf16 int4[g128,halves256]"
