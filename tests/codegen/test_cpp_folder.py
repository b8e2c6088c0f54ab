"""The folder of compiled kernels: one that cannot be written, a full disk and two processes do no harm."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._inductor import config

from bitfold.codegen import CodegenError
from bitfold.codegen.cpp import library as libraries
from bitfold.codegen.cpp.kept_files import KERNELS
from bitfold.codegen.cpp.vectors import ALL, VECTORS, Vectors, runnable
from bitfold.formats import BitfoldError
from bitfold.lowering.target import get_target

pytestmark = pytest.mark.skipif(bool(get_target("cpu").missing()), reason="there is no C++ compiler")

PORTABLE = VECTORS["portable"]
SHARED = """
import ctypes, sys
from pathlib import Path
from bitfold.codegen.cpp import library as libraries
from bitfold.codegen.cpp.vectors import VECTORS

libraries.folder = lambda: Path(sys.argv[1])
library = libraries.Library('extern "C" int run() { return 9; }', VECTORS["portable"])
print("ready", flush=True)
sys.stdin.readline()  # so that both begin at once
print(ctypes.CDLL(str(library.path())).run(), flush=True)
"""


def test_a_folder_that_cannot_be_written_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "file"
    full.write_text("no folder")
    monkeypatch.setattr(libraries, "folder", lambda: full / "kernels")
    library = libraries.Library('extern "C" int run() { return 7; }\n', PORTABLE)
    with pytest.warns(UserWarning, match="cannot be kept in"):
        path = library.path()
    assert path.exists()
    broken = libraries.Library("no C++\n", PORTABLE)
    with pytest.raises(CodegenError, match="refused a kernel"):
        broken.path()


def test_a_library_that_cannot_be_loaded_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left where the power went between the name and the bytes."""
    monkeypatch.setattr(libraries, "folder", lambda: tmp_path)
    for number, damaged in ((11, b""), (12, b"\x7fELF and no more")):
        library = libraries.Library(f'extern "C" int run() {{ return {number}; }}\n', PORTABLE)
        (tmp_path / f"{library.name}.so").write_bytes(damaged)
        assert library.loaded(ctypes.CDLL).run() == number


def test_folders_may_have_spaces_in_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of compiled kernels, and that in which this package is installed."""
    here = tmp_path / "my kernels"
    monkeypatch.setattr(libraries, "folder", lambda: here)
    shutil.copytree(libraries.HEADERS, tmp_path / "my headers")
    monkeypatch.setattr(libraries, "HEADERS", tmp_path / "my headers")
    text = '#include "kernel.h"\nextern "C" int run() { return bitfold::kWeights; }\n'
    library = libraries.Library(text, PORTABLE)
    assert library.loaded(ctypes.CDLL).run() == 4 and library.path().parent == here


def test_a_full_disk_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler says that there is no space by refusing; elsewhere it does not."""
    monkeypatch.setattr(libraries, "folder", lambda: tmp_path / "kernels")
    whole = libraries.Library._compiled

    def compiled(self: libraries.Library, beside: Path) -> Path:
        if tmp_path in beside.parents:
            raise CodegenError("no space left on device")
        return whole(self, beside)

    monkeypatch.setattr(libraries.Library, "_compiled", compiled)
    library = libraries.Library('extern "C" int run() { return 8; }\n', PORTABLE)
    with pytest.warns(UserWarning, match="cannot be kept in"):
        assert tmp_path not in library.path().parents
    assert not list((tmp_path / "kernels").iterdir())


def test_two_processes_share_a_folder(tmp_path: Path, at_once: Callable[..., list[str]]) -> None:
    """Each finds a whole library, and one is left, with nothing beside it."""
    assert at_once(SHARED, [[str(tmp_path / "kernels")]] * 2) == ["9\n", "9\n"]
    (left,) = (tmp_path / "kernels").iterdir()
    assert ctypes.CDLL(str(left)).run() == 9


@pytest.mark.parametrize("cut", [0, 100])
def test_a_library_that_was_cut_short_is_made_anew(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a power cut, or by a disk that was full: once, and what cannot be loaded even so is said."""
    monkeypatch.setattr(libraries, "folder", lambda: tmp_path)
    library = libraries.Library(f'extern "C" int run() {{ return 1{cut}; }}\n', PORTABLE)
    path = library.path()
    path.write_bytes(path.read_bytes()[:cut])
    assert library.loaded(ctypes.CDLL).run() == int(f"1{cut}")
    assert ctypes.CDLL(str(path)).run() == int(f"1{cut}")

    def refuse(path: str) -> None:
        raise OSError("never")

    with pytest.raises(CodegenError, match=r"just compiled and cannot be loaded \(never\)"):
        library.loaded(refuse)


def aged(path: Path, seconds: float, size: int = 0) -> Path:
    """The file, made if a size is given, as if it had been used so long ago."""
    if size:
        path.write_bytes(bytes(size))
    at = time.time() - seconds
    os.utime(path, (at, at))
    return path


def test_the_folder_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not used longest goes; what this process uses stays, and what another has just used."""
    monkeypatch.setattr(libraries, "folder", lambda: tmp_path)
    monkeypatch.setenv(KERNELS.variable, "3")

    def compiled(self: libraries.Library, beside: Path) -> Path:
        (beside / "made").write_bytes(b"a library")
        return beside / "made"

    monkeypatch.setattr(libraries.Library, "_compiled", compiled)
    text = 'extern "C" int run() {{ return {}; }}\n'
    mine = libraries.Library(text.format(21), PORTABLE)
    path = aged(Path(mine.path()), 9000)
    others = [aged(tmp_path / f"{i}.so", 1000 * i, 2**20) for i in (1, 2, 3, 4)]
    new = aged(tmp_path / "new.so", 10, 2**20)
    left = tmp_path / "beside-left"
    left.mkdir()
    aged(left, 9000)
    libraries.Library(text.format(22), PORTABLE).path()
    assert [one.exists() for one in others] == [True, False, False, False]
    assert path.exists() and new.exists() and not left.exists()
    mine.path()  # used now
    assert time.time() - path.stat().st_mtime < 900
    monkeypatch.setenv(KERNELS.variable, "0.001")
    libraries.Library(text.format(23), PORTABLE).path()
    assert len(list(tmp_path.glob("c*.so"))) == 3 and new.exists() and not others[0].exists()
    monkeypatch.setenv(KERNELS.variable, "many")
    with pytest.raises(BitfoldError, match="BITFOLD_KEPT_KERNELS_MB is a number of megabytes"):
        libraries.Library(text.format(24), PORTABLE).path()


def test_a_folder_that_is_only_read_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody writes there when a library was used, and nothing is removed."""
    monkeypatch.setattr(libraries, "folder", lambda: tmp_path)
    library = libraries.Library('extern "C" int run() { return 25; }\n', PORTABLE)
    path = library.path()

    def refused(*args: object, **more: object) -> None:
        raise PermissionError(30, "Read-only file system")

    for name in ("utime", "unlink", "replace", "mkdir"):
        monkeypatch.setattr(os, name, refused)
    assert library.loaded(ctypes.CDLL).run() == 25 and library.path() == path


ALONE = """
from pathlib import Path
import sys
from bitfold.codegen.cpp import library as libraries
from bitfold.codegen.cpp.vectors import VECTORS

libraries.folder = lambda: Path(sys.argv[1])
made = libraries.Library('extern "C" int run() { return 26; }', VECTORS["portable"]).path()
assert made.exists()
print(made)
"""


def test_where_nothing_is_to_be_kept_nothing_is(tmp_path: Path) -> None:
    """A folder of the process's own serves, and goes with it."""
    env = os.environ | {KERNELS.variable: "0"}
    said = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "kernels")], env=env, check=True, capture_output=True
    )
    made = Path(said.stdout.decode().split()[-1])
    assert not made.exists() and not made.parent.exists() and not (tmp_path / "kernels").exists()


def test_two_processes_share_a_folder_that_is_too_small(
    tmp_path: Path, at_once: Callable[..., list[str]]
) -> None:
    words = [[str(tmp_path / "kernels")]] * 2
    assert at_once(SHARED, words, **{KERNELS.variable: "0.001"}) == ["9\n", "9\n"]


def test_a_library_is_named_by_what_goes_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text, what that includes, the compiler and its options: nothing else compiles it anew."""
    shutil.copytree(libraries.HEADERS, tmp_path / "headers")
    monkeypatch.setattr(libraries, "HEADERS", tmp_path / "headers")
    text = '#include "kernel.h"\n#include VECTORS\nextern "C" int run() { return 27; }\n'
    library = libraries.Library(text, VECTORS["avx512"])

    def name() -> str:
        libraries._header.cache_clear()
        return library.name

    def changed(header: str) -> bool:
        before = name()
        with (tmp_path / "headers" / header).open("a") as file:
            file.write("// a word\n")
        return name() != before

    # pairs16.h is included by avx512.h alone
    assert [changed(one) for one in ("kernel.h", "avx512.h", "pairs16.h")] == [True] * 3
    assert [changed(one) for one in ("conv.h", "avx2.h", "attention.h")] == [False] * 3
    before = name()
    monkeypatch.setattr(libraries, "_compiler", lambda: "g++ 99")
    assert name() != before
    assert libraries.Library(text, VECTORS["avx2"]).name != name()
    before = name()
    with config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):
        assert name() != before
    shutil.move(tmp_path / "headers", tmp_path / "the same elsewhere")
    monkeypatch.setattr(libraries, "HEADERS", tmp_path / "the same elsewhere")
    assert name() == before


@pytest.mark.parametrize("vectors", ALL, ids=str)
def test_vectors_name_an_architecture(vectors: Vectors) -> None:
    """By Inductor's -march=native a library would be one processor's, and the folder may be shared."""
    assert (libraries.HEADERS / vectors.header).exists()
    assert [flag for flag in vectors.flags if flag.startswith("-march=")] not in ([], ["-march=native"])
    assert vectors.name not in vectors.also and VECTORS.keys() >= set(vectors.also)


@pytest.mark.parametrize("name", ["runtime", "conv_runtime", "attention"])
def test_all_headers_are_found(name: str) -> None:
    """What the compiler includes is among what a name goes by; torch's headers are none of ours."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    text = libraries.text_of(name)
    for vectors in runnable():
        told = [f"-I{libraries.HEADERS}", f'-DVECTORS="{vectors.header}"', *vectors.flags, "-std=c++20"]
        command = [get_cpp_compiler(), "-MM", "-MG", "-x", "c++", *told, "-"]
        said = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout.split()
        ours = {Path(one).name for one in said if Path(one).parent == libraries.HEADERS}
        assert len(ours) > 5 and ours <= set(libraries._included(text, vectors.header))
