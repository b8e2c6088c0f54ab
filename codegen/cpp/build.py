"""From source text to a kernel that runs on this processor: compiled by torch's C++ builder, kept on disk.

In: specs. Out: `bitfold::fused` knows them, so that a call goes from the graph to the kernel without Python.

    know([spec, ...])            compiled side by side, those that are not on disk yet
    torch.ops.bitfold.fused([x, codes, scales], str(spec))

Operators themselves (`headers/runtime.cpp`, `attention.cpp`) are compiled once for a machine. A library
lies in a folder beside torch's own compile caches, named by all that went into it; it is built beside its
place and renamed in, so that processes may share the folder, which is held to a size (`kept_files.py`). Where
that folder cannot be written, or is to hold nothing, one of this process's own serves.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar

import torch

from ...formats.granularity import Granularity
from ..spec import CodegenError, GemmSpec
from .body import Body
from .kept_files import BESIDE, KERNELS, put, used
from .source import source
from .support import obstacle

HEADERS = Path(__file__).with_name("headers")


def _arm() -> str:
    """The least of ARM's architectures that has what this processor does and kernels use."""
    told = Path("/proc/cpuinfo")
    apple = sys.platform == "darwin" and os.uname().machine == "arm64"
    has = apple or (told.exists() and "asimddp" in told.read_text(encoding="utf-8", errors="replace"))
    return "armv8.2-a+dotprod" if has else "armv8-a"


_PLAIN = {"x86_64": ("-march=x86-64",), "aarch64": ("-march=armv8-a",), "arm64": ("-march=armv8-a",)}
# Vectors -> how GCC and Clang are told of them. Each says an architecture: by Inductor's -march=native plain
# C++ becomes the vectors of the processor that compiles it, and others may share the library.
FLAGS = {
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "avx512vnni": ("-march=x86-64-v4", "-mavx512vnni"),
    "amx": ("-march=x86-64-v4", "-mavx512vnni", "-mamx-tile", "-mamx-int8"),
    # Tiles in plain C++, for tests where there are none.
    "amx_model": ("-march=x86-64-v4", "-mavx512vnni", "-DBITFOLD_AMX_MODEL"),
    "neon": (f"-march={_arm()}",),
    "portable": _PLAIN.get(os.uname().machine, ()),
}
_AVX512 = ("avx512vnni", "amx", "amx_model")
# Vectors -> narrower ones that the same processor has.
_ALSO = {
    "amx": ("avx512vnni", "avx512", "avx2", "amx_model"),
    "avx512vnni": ("avx512", "avx2", "amx_model"),
    "avx512": ("avx2",),
}
# What Inductor adds for speed must not drop NaN.
STRICT = ("-fno-finite-math-only", "-fsigned-zeros", "-fno-associative-math", "-fno-reciprocal-math")
# Scales and x are turned into float32 by plain loops, which Inductor's flags for GCC would leave as they are.
LOOPS = ("-ftree-loop-vectorize",)
# A library calls its own functions. Operators are seen by all that is loaded after them, and their inline
# functions, written in other vectors, would take the place of a kernel's.
OWN = ("-Wl,-Bsymbolic",) if sys.platform == "linux" else ()
# Of loops over floats that call functions: none of those here says by errno what went wrong.
NO_ERRNO = ("-fno-math-errno",)
T = TypeVar("T")
OUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BYTE = -1  # beside these: whatever has one byte


class Facts(ctypes.Structure):
    """What `runtime.cpp` knows of a spec, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("run", "many", "wants")),
        *((name, ctypes.c_int64) for name in ("n", "k", "padded", "stride")),
        *((name, ctypes.c_int64) for name in ("scale_row", "scale_group", "groups", "sum_cols")),
        *((name, ctypes.c_int32) for name in ("weights", "parts", "scales", "zeros", "level")),
        *(
            (name, ctypes.c_int32)
            for name in ("bias", "matrices", "vectors", "codes", "out", "token_scales", "x")
        ),
        *((name, ctypes.c_int64) for name in ("scale_count", "scale_type", "zero_type")),
    ]


@cache
def vectors() -> str:
    """The widest vectors that this processor has and a header is written for."""
    found = torch.backends.cpu.get_cpu_capability()
    if found == "AVX512":
        if not torch.cpu._is_vnni_supported():
            return "avx512"
        return "amx" if _has_tiles() else "avx512vnni"
    if found == "AVX2":
        return "avx2"
    return "neon" if os.uname().machine in ("aarch64", "arm64") else "portable"


def runnable() -> tuple[str, ...]:
    """All vectors that kernels can be written in and that this processor runs: what tests go through."""
    return tuple(dict.fromkeys((vectors(), *_ALSO.get(vectors(), ()), "portable")))


def _has_tiles() -> bool:
    """Whether this process may use AMX: the system keeps tiles for those that ask (`arch_prctl`, once)."""
    if not torch.cpu._is_amx_tile_supported():
        return False
    if torch.cpu._init_amx():
        return True
    warnings.warn(
        "this processor has AMX, but the system does not let this process use it, so kernels do with AVX-512 "
        "VNNI; a kernel of Linux 5.16 or newer that is not sandboxed grants it",
        stacklevel=2,
    )
    return False


def header(vectors: str) -> str:
    """The file that these vectors are written in."""
    return "avx512.h" if vectors in _AVX512 else f"{vectors}.h"


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
    vectors: str
    operator: bool = False
    loops: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """What the compiler is told beyond Inductor's own options."""
        return (*FLAGS[self.vectors], *STRICT, *LOOPS, *OWN, *(NO_ERRNO if self.loops else ()))

    @property
    def name(self) -> str:
        """By all that goes into it."""
        made = hashlib.sha256(_headers().encode())
        version = torch.__version__ if self.operator else ""
        for part in (self.text, self.vectors, *self.flags, version):
            made.update(part.encode() + b"\0")
        return "c" + made.hexdigest()[:32]

    def path(self) -> Path:
        """The compiled file, compiled now if it is not there. CodegenError if the compiler refuses."""
        refused, why = None, ""
        for place in (folder, _private) if KERNELS.bytes() > 0 else (_private,):
            here = place()
            found = here / f"{self.name}.so"
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
        raise refused or CodegenError(f"no folder can be written in which to compile {self.name}")

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
        from torch._inductor.cpp_builder import CppBuilder, CppOptions, CppTorchOptions, run_compile_cmd
        from torch._inductor.exc import CppCompileError

        (beside / "source.cpp").write_text(self.text, encoding="utf-8")
        told = f"-I{shlex.quote(str(HEADERS))}"
        flags = [f"-DVECTORS='\"{header(self.vectors)}\"'", told, *self.flags]
        if self.operator:
            # The interface as of torch 2.10, which later versions keep.
            flags.append("-DTORCH_TARGET_VERSION=0x020a000000000000")
            options: CppOptions = CppTorchOptions(warning_all=False, extra_flags=flags)
        else:
            options = CppOptions(warning_all=False, extra_flags=flags)
        # Names without a folder: torch's builder splits its command where a folder's name has a space.
        builder = CppBuilder("library", "source.cpp", options)
        try:
            run_compile_cmd(builder.get_command_line(), str(beside))
        except CppCompileError as error:
            raise CodegenError(f"the C++ compiler refused a kernel: {str(error)[-2000:]}") from error
        return beside / builder.get_target_file_path()


@cache
def _headers() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(HEADERS.glob("*.h")))


def library_of(spec: GemmSpec, words: str | None = None) -> Library:
    """The kernel's, in this processor's vectors or others."""
    return Library(source(spec), words or vectors())


def text_of(name: str) -> str:
    """A file of headers/ that is compiled by itself; what it refuses is said with its name."""
    return f'#line 1 "{name}.cpp"\n' + (HEADERS / f"{name}.cpp").read_text(encoding="utf-8")


@lru_cache(maxsize=1024)
def _entries(library: Library) -> dict[str, int | None]:
    """The addresses of the kernel's functions; None where it has not got one."""
    loaded = library.loaded(ctypes.CDLL)
    found = {name: getattr(loaded, name, None) for name in ("run", "many", "wants")}
    return {name: ctypes.cast(f, ctypes.c_void_p).value if f else None for name, f in found.items()}


@cache
def operator(name: str, told: str, build: Callable[[str], None]) -> ctypes.CDLL:
    """One of torch's operators, `headers/<name>.cpp`, loaded. `told`: its function that takes `build`, which
    makes a kernel that the operator does not know yet when it is called.

    All operators see each other's symbols: their types and C functions have names of their own."""
    text = text_of(name)

    def load(path: str) -> ctypes.CDLL:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        # What Inductor's C++ calls by name is looked for among all libraries that are there for all.
        return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

    loaded = Library(text, vectors(), operator=True).loaded(load)
    getattr(loaded, told)(_called_from_c(build))
    return loaded


_refused = threading.local()  # why, as C reads it, until a thread asks again


@cache
def _called_from_c(build: Callable[[str], None]) -> Callable[[bytes], int | None]:
    """Kept alive: the operator calls it."""

    def call(text: bytes) -> int | None:
        try:
            build(text.decode())
        except Exception as error:  # nothing may be raised through C
            why = str(error) or f"{text.decode()}: {type(error).__name__}"
            _refused.why = ctypes.create_string_buffer(why.encode())
            return ctypes.addressof(_refused.why)
        return None

    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(call)


def _build(text: str) -> None:
    know([GemmSpec.parse(text)])


_known: set[tuple[str, str]] = set()


def know(specs: Iterable[GemmSpec], words: str | None = None) -> None:
    """Makes the operator know these specs; their kernels are compiled side by side. CodegenError for one that
    no CPU kernel computes, or that the compiler refuses."""
    words = words or vectors()
    wanted = [spec for spec in dict.fromkeys(specs) if (str(spec), words) not in _known]
    if not wanted:
        return
    for spec in wanted:
        if (why := obstacle(spec)) is not None:
            raise CodegenError(
                f"no CPU kernel computes {spec}: {why}; graphs lowered for cpu ask for none such"
            )
    libraries = {spec: library_of(spec, words) for spec in wanted}
    apart = list(dict.fromkeys(libraries.values()))
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        first = pool.submit(operator, "runtime", "bitfold_builder", _build)
        entries = dict(zip(apart, pool.map(_entries, apart), strict=True))
        loaded = first.result()
    assert loaded.bitfold_size_of_facts() == ctypes.sizeof(Facts), "the two do not list the same fields"
    for spec in wanted:
        facts = facts_of(spec, entries[libraries[spec]])
        loaded.bitfold_know(str(spec).encode(), ctypes.byref(facts))
        # One text has one kernel at a time: another's vectors, in a test, take its place.
        _known.difference_update({(str(spec), other) for other in FLAGS})
        _known.add((str(spec), words))


def facts_of(spec: GemmSpec, entries: Mapping[str, int | None]) -> Facts:
    """The numbers that `runtime.cpp` needs."""
    body, parts = Body(spec), spec.weight.parts
    walk, scale = body.walk, spec.weight.scale
    place = {name: parts.index(name) if name in parts else -1 for name in ("scales", "zeros", "tensor_scale")}
    grain = scale.granularity if scale is not None else Granularity(None, None)
    groups = 1 if grain.cols is None else -(-spec.k // grain.cols)
    rows = 1 if grain.rows is None else spec.n // grain.rows
    by_group = spec.weight.layout.by_group and grain.cols is not None
    tokens = 0
    if spec.activation is not None and spec.activation.scale is not None:
        of_x = spec.activation.scale.granularity
        tokens = 1 if of_x.rows is None else 1 + (1 if of_x.cols is None else spec.k // of_x.cols)
    return Facts(
        **entries,
        n=spec.n,
        k=spec.k,
        padded=walk.runs * walk.codes,
        stride=walk.stride,
        scale_row=1 if by_group else groups,
        scale_group=rows if by_group else 1,
        groups=groups,
        sum_cols=body.sum_cols,
        weights=spec.weights,
        parts=len(parts),
        scales=place["scales"],
        zeros=place["zeros"],
        level=place["tensor_scale"],
        bias=int(spec.bias),
        matrices=spec.epilogue.count("e"),
        vectors=spec.epilogue.count("v"),
        codes=int(spec.activation is not None),
        out=OUTS[spec.out],
        token_scales=tokens,
        x=OUTS[spec.dtype],
        scale_count=rows * groups,
        scale_type=OUTS.get(scale.stored, BYTE) if scale is not None else BYTE,
        zero_type=OUTS.get(scale.stored, BYTE) if scale is not None and scale.zero != "int" else BYTE,
    )


def call(spec: GemmSpec, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """y of one call, for tests and benchmarks."""
    know([spec])
    found: list[torch.Tensor] = torch.ops.bitfold.fused(list(inputs), str(spec))
    return found[0]
