"""CPU kernels and the operators that call them, under the address and undefined sanitizers.

Each is a process of its own (`sanitizers.py`) that runs tests of values: loops, tails and alignments of
products, convolutions, attention and layers one after the other, in the vectors that torch can be told of and
in the widest that this processor has. Slow, since all is compiled anew: up to a minute each on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sanitized_faults import FAULTS

from bitfold.codegen.cpp.vectors import VECTORS, Vectors, runnable, widest

FOUND = 99  # what a process ends with in which a sanitizer found something
HERE = Path(__file__).parent
# Those that torch can be told of, and what it has.
KINDS = [one for one in runnable() if one.capability is not None or one == widest()]
PARTS = {
    "products": ["test_cpp_values.py::test_formats", "test_cpp_specials.py::test_specials_propagate"],
    # Digits and words of one row, a share of rows for each of several threads, products that are one call.
    "rows": [
        "test_cpp_threads.py",
        "test_cpp_words.py::test_the_largest_of_everything",
        "test_cpp_digits.py::test_half_floats",
    ],
    "convolutions": [
        "test_conv_values.py::test_values",
        "test_conv_values.py::test_extreme_codes_do_not_saturate",
        "test_conv_values.py::test_x_may_lie_in_any_order_and_results_have_channels_innermost",
    ],
    "depthwise": ["test_conv_values.py::test_any_depthwise_shape"],
    "attention": [
        "test_cpp_attention.py::test_sizes_of_heads",
        "test_cpp_attention.py::test_a_page_that_is_not_there_is_not_read",
        "test_cpp_attention.py::test_nan_reaches_the_queries_that_see_it_and_no_others",
    ],
    "layers": ["../lowering/test_run_pieces.py::test_layers_are_one_call"],
}
# Of tests that run other vectors, too.
ONLY = ("convolutions",)
RUNS = [(part, vectors) for part in PARTS for vectors in KINDS]
# Tiles of AMX, or their model.
RUNS += [("tiles", widest())] * any(one.tiles for one in runnable())
# Groups side by side, as AVX2 has them, in AVX2 and in plain C++.
RUNS += [("side by side", VECTORS["avx2"])] * (VECTORS["avx2"] in runnable())
PARTS["side by side"] = ["test_cpp_lanes.py::test_values"]
PARTS["tiles"] = [
    "test_cpp_tiles.py::test_formats",
    "test_cpp_tiles.py::test_epilogues",
    "test_cpp_tiles.py::test_x_without_digits_goes_the_way_of_floats",
    *(f"test_conv_values.py::test_values[{case}-amx_model]" for case in ("all at once", "a stem", "groups")),
]


def shared(name: str) -> str:
    """One of the compiler's libraries; the test is skipped where there is none."""
    said = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    if not os.path.isabs(said.stdout.strip()):
        pytest.skip(f"this compiler has no {name}")
    return said.stdout.strip()


def watched(tests: list[str], vectors: Vectors, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Tests in a process with sanitizers."""
    env = os.environ | {
        "LD_PRELOAD": f"{shared('libasan.so')} {shared('libstdc++.so')}",
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={FOUND}",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join([str(HERE), *(p for p in sys.path if p)]),
        **({"ATEN_CPU_CAPABILITY": vectors.capability} if vectors.capability else {}),
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
    }
    command = [sys.executable, "-m", "pytest", "-s", "-x", "-p", "sanitizers", "-p", "no:cacheprovider"]
    paths = [str(HERE / test) for test in tests]
    return subprocess.run([*command, *more, *paths], env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "vectors"), RUNS, ids=str)
def test_under_sanitizers(part: str, vectors: Vectors, tmp_path: Path) -> None:
    chosen = [] if part == "tiles" else ["-m", "not slow"]  # a model of tiles is
    chosen += ["-k", f"{vectors} and not model"] if part in ONLY else []
    done = watched(PARTS[part], vectors, tmp_path, *chosen)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, tmp_path: Path) -> None:
    """Else all of the above could pass unwatched."""
    done = watched([f"sanitized_faults.py::test_fault[{fault}]"], VECTORS["portable"], tmp_path)
    assert done.returncode == FOUND, done.stderr[-2000:]
    assert "AddressSanitizer" in done.stderr or "runtime error" in done.stderr, done.stderr[-2000:]
