"""A compiled frame is kept on disk and called by the next process, and only where it is the same frame."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_repeats import WIDE, Layer, Tower
from torch import Tensor, nn
from torch.fx import symbolic_trace

import bitfold as bf
from bitfold.codegen.cpp import kept_files
from bitfold.codegen.cpp.kept_files import FRAMES
from bitfold.lowering import backend
from bitfold.lowering.cpu import kept_runs
from bitfold.lowering.frame_key import frame_key
from bitfold.passes import Miss

pytestmark = pytest.mark.skipif(bool(bf.get_target("cpu").missing()), reason="there is no C++ compiler")


def tower() -> nn.Module:
    torch.manual_seed(0)
    made = Tower([Layer() for _ in range(4)]).eval()
    return bf.quantize(made, "int8", example_inputs=inputs())  # type: ignore[no-any-return]


def inputs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, WIDE, generator=g), torch.randn(WIDE, generator=g)


def run(model: nn.Module, calls: int = 2) -> list[Tensor]:
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend.bitfold, options={"recipe": "none"}, fullgraph=True)
    with torch.inference_mode():
        return [fast(*inputs())[0].clone() for _ in range(calls)]


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """A folder for frames alone."""
    with mock.patch.object(kept_runs, "place", lambda key: tmp_path / f"{key}.json"):
        yield tmp_path


def test_the_next_process_calls_what_this_one_compiled(place: Path) -> None:
    first, wanted = tower(), run(tower())
    (kept,) = place.glob("*.json")
    assert json.loads(kept_files.read(kept))["kernels"]["fused"]
    with mock.patch.object(backend, "_compile_folded", side_effect=AssertionError("it is compiled anew")):
        found = run(first)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    seen = [layer.seen for layer in first.layers]  # written to, call by call
    again = tower()
    run(again)
    assert all(torch.equal(a, b.seen) for a, b in zip(seen, again.layers, strict=True))


def test_a_loaded_program_is_called_without_compiling(place: Path, tmp_path: Path) -> None:
    """As a language model's step starts: saved, loaded, `bf.compile`; layers write to buffers of theirs."""
    torch.manual_seed(0)
    model = Tower([Layer() for _ in range(4)]).eval()
    made = bf.quantize(model, "int8", scope="program", example_inputs=inputs())
    assert isinstance(made, torch.fx.GraphModule)
    bf.save(made, tmp_path / "step.program")
    with torch.inference_mode():
        fast = bf.compile(bf.load(tmp_path / "step.program"))
        wanted = [fast(*inputs())[0].clone() for _ in range(2)]
    assert list(place.glob("*.json"))
    with mock.patch.object(backend, "_compile_folded", side_effect=AssertionError("it is compiled anew")):
        again = bf.compile(bf.load(tmp_path / "step.program"))
        with torch.inference_mode():
            found = [again(*inputs())[0].clone() for _ in range(2)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"steps": []}', '{"steps": [{"library": "/nowhere.so"}]}'])
def test_a_file_that_is_not_what_was_written_is_passed_over(place: Path, text: str) -> None:
    wanted = run(tower(), 1)
    (kept,) = place.glob("*.json")
    changed = json.loads(kept_files.read(kept)) | {"given": ["a"]}
    for wrong in (text, json.dumps(changed), f"{'0' * 64}\n{json.dumps(changed)}"):
        kept.write_text(wrong)
        assert torch.equal(run(tower(), 1)[0], wanted[0])
        assert json.loads(kept_files.read(kept))["steps"]  # and is written anew
    kept_files.write(kept, text, FRAMES)  # as a version of another shape would have
    assert torch.equal(run(tower(), 1)[0], wanted[0])


def test_a_library_that_is_gone_is_compiled_again(place: Path) -> None:
    wanted = run(tower(), 1)
    (kept,) = place.glob("*.json")
    told = json.loads(kept_files.read(kept))
    told["steps"][0]["library"] += ".gone"
    kept_files.write(kept, json.dumps(told), FRAMES)
    assert torch.equal(run(tower(), 1)[0], wanted[0])


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    with mock.patch.object(kept_runs, "place", lambda key: file / key):
        a, b = run(tower(), 1), run(tower(), 1)
    assert torch.equal(a[0], b[0])


def test_nothing_kept_is_nothing_recalled(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound of 0 also passes over what an earlier process left; an empty one is one that is not set."""
    kept = place / "frame"
    kept.write_text("")
    monkeypatch.setattr(kept_runs, "place", lambda key: kept)
    monkeypatch.setenv("BITFOLD_KEPT_FRAMES_MB", "0")
    assert isinstance(said := kept_runs.recalled("frame"), Miss) and "kept" in said.reason
    monkeypatch.setenv("BITFOLD_KEPT_FRAMES_MB", "")
    assert FRAMES.bytes() == 64 << 20


def test_the_folder_of_frames_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not read longest goes, never what was just written; what a dead process left goes too."""
    monkeypatch.setenv(FRAMES.variable, str(3500 / 2**20))
    for i in range(3):
        kept_files.write(tmp_path / f"{i}.json", str(i) * 1000, FRAMES)
        os.utime(tmp_path / f"{i}.json", (i + 1, i + 1))
    assert kept_files.read(tmp_path / "0.json") == "0" * 1000
    (tmp_path / "beside-old").write_text("half")
    os.utime(tmp_path / "beside-old", (1, 1))
    (tmp_path / "beside-new").write_text("half")
    kept_files.write(tmp_path / "3.json", "3" * 1000, FRAMES)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"0.json", "2.json", "3.json", "beside-new"}
    kept_files.write(tmp_path / "4.json", "4" * 9000, FRAMES)  # larger than all may be
    assert {path.name for path in tmp_path.glob("*.json")} == {"4.json"}
    monkeypatch.setenv(FRAMES.variable, "0")
    kept_files.write(tmp_path / "5.json", "5", FRAMES)
    assert not (tmp_path / "5.json").exists()
    for wrong in ("much", "-1", "nan"):
        monkeypatch.setenv(FRAMES.variable, wrong)
        with pytest.raises(bf.BitfoldError, match="number of megabytes"):
            kept_files.write(tmp_path / "6.json", "6", FRAMES)


SHARING = """
import sys
from pathlib import Path
from bitfold.codegen.cpp import kept_files

place, seed = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()  # so that both begin at once
found = 0
for i in range(400):
    path = place / f"{(i // 4 * 7 + seed) % 23}.json"
    try:
        assert kept_files.read(path) == path.name * 100
        found += 1
    except FileNotFoundError:
        kept_files.write(path, path.name * 100, kept_files.FRAMES)
print(found, flush=True)
"""


def test_two_processes_share_a_folder_that_is_too_small(
    tmp_path: Path, at_once: Callable[..., list[str]]
) -> None:
    """Neither reads anything but what was written, nor stumbles over what the other removed."""
    words = [[str(tmp_path), str(seed)] for seed in (0, 5)]
    assert all(int(said) > 0 for said in at_once(SHARING, words, **{FRAMES.variable: str(6000 / 2**20)}))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.json")) <= 6000
    assert not list(tmp_path.glob("beside-*"))


def key_of(call: Any, *given: Tensor, words: tuple[str, ...] = ()) -> str | Miss:
    return frame_key(symbolic_trace(call), given, words)


def test_what_a_key_tells_apart() -> None:
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    base = key_of(lambda x, w: torch.relu(x @ w) * 2.0, x, w)
    assert isinstance(base, str) and base == key_of(lambda x, w: torch.relu(x @ w) * 2.0, x.clone(), w)
    others = [
        key_of(lambda x, w: torch.relu(x @ w) * 2.5, x, w),
        key_of(lambda x, w: torch.tanh(x @ w) * 2.0, x, w),
        key_of(lambda x, w: torch.relu(w @ x.mT) * 2.0, x, w),
        key_of(lambda x, w: torch.relu(x @ w) * 2, x, w),
        key_of(lambda x, w: torch.relu(x @ w) * True, x, w),
        key_of(lambda x, w: torch.relu(x @ w) * 2.0, x[:2], w),
        key_of(lambda x, w: torch.relu(x @ w) * 2.0, x, w.mT),
        key_of(lambda x, w: torch.relu(x @ w) * 2.0, x.double(), w.double()),
        key_of(lambda x, w: torch.relu(x @ w) * 2.0, x, w.clone().requires_grad_()),
        key_of(lambda x, w: torch.relu(x @ w) * 2.0, x, w, words=("another",)),
    ]
    with torch.no_grad():
        others.append(key_of(lambda x, w: torch.relu(x @ w) * 2.0, x, w))
    with mock.patch("torch._inductor.config.max_fusion_size", 3):
        others.append(key_of(lambda x, w: torch.relu(x @ w) * 2.0, x, w))
    with mock.patch("torch.get_num_threads", lambda: 63):
        others.append(key_of(lambda x, w: torch.relu(x @ w) * 2.0, x, w))
    assert all(isinstance(other, str) for other in others)
    assert len({base, *others}) == len(others) + 1


def test_what_has_no_key() -> None:
    x = torch.randn(4, 8)
    held = nn.Sequential(nn.Linear(8, 8))
    assert "call_module" in key_miss(frame_key(symbolic_trace(held), [x], []))
    assert "memory that two" in key_miss(key_of(lambda a, b: a + b, x, x[:, :4]))
    # Somebody's, another library's, and such a one as Dynamo has it.
    for target in (key_miss, torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise):
        gm = symbolic_trace(lambda a: torch.relu(a))
        next(node for node in gm.graph.nodes if node.op == "call_function").target = target
        assert "no name" in key_miss(frame_key(gm, [x], []))


def key_miss(found: str | Miss) -> str:
    assert isinstance(found, Miss)
    return found.reason


def test_keys_are_the_same_in_another_process() -> None:
    body = "torch.relu(x.sum(-1, keepdim=True)) + 1"
    code = (
        "import torch; from torch.fx import symbolic_trace; from bitfold.lowering.frame_key import frame_key;"
        f"print(frame_key(symbolic_trace(lambda x: {body}), [torch.ones(3)], []))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and "Miss" not in found.pop()
