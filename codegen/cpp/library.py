"""From C++ to a library of this processor's: compiled by torch's builder, and kept on disk.

In: a text. Out: a file, compiled if it is not there yet.

    Library(text, VECTORS["avx2"]).path()  ->  <caches of torch>/bitfold/cpu/c3f9...so;  .loaded(ctypes.CDLL)

It lies in a folder beside torch's own compile caches, named by all that goes into it; it is built beside its
place and renamed in, so that processes may share the folder, which is held to a size (`kept_files.py`). Where
that folder cannot be written, or is to hold nothing, one of this process's own serves.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from ..spec import CodegenError
from .kept_files import BESIDE, KERNELS, put, used
from .vectors import Vectors

HEADERS = Path(__file__).with_name("headers")
# What Inductor adds for speed must not drop NaN.
STRICT = ("-fno-finite-math-only", "-fsigned-zeros", "-fno-associative-math", "-fno-reciprocal-math")
# x, and scales where vectors have no eights.h, are turned into float32 by plain loops, which Inductor's flags
# for GCC would leave as they are.
LOOPS = ("-ftree-loop-vectorize",)
# A library calls its own functions. Operators are seen by all that is loaded after them, and their inline
# functions, written in other vectors, would take the place of a kernel's.
OWN = ("-Wl,-Bsymbolic",) if sys.platform == "linux" else ()
# Of loops over floats that call functions: none of those here says by errno what went wrong.
NO_ERRNO = ("-fno-math-errno",)
_INCLUDE = re.compile(r'^#include ("[^"]+"|VECTORS)', re.MULTILINE)
T = TypeVar("T")


def folder() -> Path:
    """Where libraries lie."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "bitfold" / "cpu"


@cache
def _private() -> Path:
    """This process's own, gone with it."""
    made, owner = Path(tempfile.mkdtemp(prefix="bitfold")), os.getpid()
    atexit.register(lambda: shutil.rmtree(made, ignore_errors=True) if os.getpid() == owner else None)
    return made


# Libraries that this process uses: it removes none of them, however little the folder may hold.
_held: set[Path] = set()


@dataclass(frozen=True)
class Library:
    """A file to compile: its text, the vectors it is written in, whether it is torch's operator, and whether
    its loops call functions that are to become vectors."""

    text: str
    vectors: Vectors
    operator: bool = False
    loops: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """What the compiler is told of the file, behind Inductor's own options."""
        return (*self.vectors.flags, *STRICT, *LOOPS, *OWN, *(NO_ERRNO if self.loops else ()))

    @property
    def name(self) -> str:
        """By all that goes into it: the compiler and its whole command line, but for folders, which are
        another machine's or installation's. What the processor is does not: flags name an architecture."""
        made = hashlib.sha256()
        options = [word for word in shlex.split(self._command()[0]) if not word.startswith(("-I", "-L"))]
        for part in (self.text, self.vectors.name, *options, torch.__version__, _compiler()):
            made.update(part.encode() + b"\0")
        for name, text in sorted(_included(self.text, self.vectors.header).items()):
            made.update(f"{name}\0{text}\0".encode())
        return "c" + made.hexdigest()[:32]

    def path(self) -> Path:
        """The compiled file, compiled now if it is not there. CodegenError if the compiler refuses."""
        refused, why, name = None, "", self.name
        for place in (folder, _private) if KERNELS.bytes() > 0 else (_private,):
            here = place()
            found = here / f"{name}.so"
            _held.add(found)
            if found.exists():
                used(found)
                return found
            try:
                here.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=here, prefix=BESIDE) as beside:
                    put(self._compiled(Path(beside)), found, KERNELS, _held)
            except OSError as error:
                why = str(error.strerror)
            except CodegenError as error:  # for the text's sake, or a full disk's
                refused, why = error, "the compiler failed there"
            else:
                if why:
                    warnings.warn(
                        f"compiled kernels cannot be kept in {folder()} ({why}), so they are compiled anew "
                        "by each process",
                        stacklevel=2,
                    )
                return found
        raise refused or CodegenError(f"no folder can be written in which to compile {name}")

    def loaded(self, load: Callable[[str], T]) -> T:
        """What `load` makes of the file. One that is no library, since a power cut or a full disk left it
        short, or that another process has just removed, is compiled anew, once. CodegenError if that is none
        either."""
        path = self.path()
        try:
            return load(str(path))
        except OSError:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise CodegenError(
                    f"{path} is no library, and cannot be removed ({error.strerror}); remove it"
                ) from error
            path = self.path()
        try:
            return load(str(path))
        except OSError as error:
            raise CodegenError(
                f"{path} was just compiled and cannot be loaded ({error}); point TORCHINDUCTOR_CACHE_DIR to "
                "a folder from which programs may be run"
            ) from error

    def _compiled(self, beside: Path) -> Path:
        from torch._inductor.cpp_builder import run_compile_cmd
        from torch._inductor.exc import CppCompileError

        (beside / "source.cpp").write_text(self.text, encoding="utf-8")
        command, made = self._command()
        try:
            run_compile_cmd(command, str(beside))
        except CppCompileError as error:
            raise CodegenError(f"the C++ compiler refused a kernel: {str(error)[-2000:]}") from error
        return beside / made

    def _command(self) -> tuple[str, str]:
        """What compiles source.cpp, and the name of the file that comes of it. Inductor's own options follow
        its configuration."""
        from torch._inductor.cpp_builder import CppBuilder, CppOptions, CppTorchOptions

        told = f"-I{shlex.quote(str(HEADERS))}"
        flags = [f"-DVECTORS='\"{self.vectors.header}\"'", told, *self.flags]
        if self.operator:
            # The interface as of torch 2.10, which later versions keep.
            flags.append("-DTORCH_TARGET_VERSION=0x020a000000000000")
            options: CppOptions = CppTorchOptions(warning_all=False, extra_flags=flags)
        else:
            options = CppOptions(warning_all=False, extra_flags=flags)
        # Names without a folder: torch's builder splits its command where a folder's name has a space.
        builder = CppBuilder("library", "source.cpp", options)
        return builder.get_command_line(), builder.get_target_file_path()


@cache
def _compiler() -> str:
    """What it says of itself."""
    from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler

    return get_compiler_version_info(get_cpp_compiler())


def _included(text: str, vectors: str) -> dict[str, str]:
    """Our headers that a text includes, and those that these include, whatever an #if says; by name."""
    found: dict[str, str] = {}
    left = [text]
    while left:
        for name in _INCLUDE.findall(left.pop()):
            name = name.strip('"').replace("VECTORS", vectors)
            if name not in found:
                found[name] = _header(HEADERS / name)
                left.append(found[name])
    return found


@cache
def _header(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def text_of(name: str) -> str:
    """A file of headers/ that is compiled by itself; what it refuses is said with its name."""
    return f'#line 1 "{name}.cpp"\n' + (HEADERS / f"{name}.cpp").read_text(encoding="utf-8")
