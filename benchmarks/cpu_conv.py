"""Models in static int8 on a CPU against float32 Inductor, in one run: ratios, and what the rounding costs.

In: options. Out: a table, and the numbers as JSON.

    python benchmarks/cpu_conv.py --models resnet lite0 mlp --threads 1 2 --vectors avx2 --out conv.json
    python benchmarks/cpu_conv.py --peers /path/to/python     (of an environment with executorch, onnxruntime)

A process for each model, batch and number of threads holds all that is compared in it: rounds of a few
calls go around, and of each the best call counts, as other programs only ever add time. float32 is Inductor
with freezing, which folds batch norm and lays weights out for oneDNN. Peers run in processes of their own,
beside a float32 of theirs that is compiled in the same way; XNNPACK, which takes whatever vectors the
processor has, has no `--vectors`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_conv_models import MODELS, build
from torch import Tensor

VECTORS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
CALLS = 8  # of one way, before the next one's turn
Way = Callable[[], Any]


def rounds(ways: dict[str, Way], seconds: float) -> dict[str, float]:
    """Seconds of the best call of each."""
    best = dict.fromkeys(ways, float("inf"))
    for run in ways.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in ways.items():
            for _ in range(CALLS):
                started = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def noise_ratio(wanted: Tensor, got: Tensor) -> float:
    """Decibels of signal over noise."""
    return float(10 * torch.log10(wanted.square().sum() / (got - wanted).square().sum()))


def frozen(model: torch.nn.Module) -> Any:
    """float32 by Inductor."""
    return torch.compile(model, options={"freezing": True})


def ours(name: str, batch: int, seconds: float) -> dict[str, Any]:
    """A row: float32; `int8_static` by torch.compile; the same as a program, by bf.compile."""
    import bitfold as bf
    from bitfold.codegen.cpp.vectors import widest

    model, shape = build(name)
    x, data = torch.randn(batch, *shape), [torch.randn(batch, *shape) for _ in range(4)]
    folded = {
        "int8_static, program": bf.quantize(model, "int8_static", scope="program", calibration=data),
        "int8_static": bf.quantize(build(name)[0], "int8_static", calibration=data),
    }
    row: dict[str, Any] = {"model": name, "batch": batch, "vectors": widest().name}
    with torch.inference_mode():
        wanted, made = model(x), {"float32": frozen(model)}
        made["int8_static"] = torch.compile(
            folded["int8_static"], backend="bitfold", options={"recipe": "none"}
        )
        made["int8_static, program"] = bf.compile(folded["int8_static, program"])
        ways: dict[str, Way] = {way: lambda run=run: run(x) for way, run in made.items()}
        seconds_of = rounds(ways, seconds)
        row["snr"] = {way: noise_ratio(wanted, ways[way]()) for way in folded}
    return row | {"ms": {way: 1e3 * found for way, found in seconds_of.items()}}


def xnnpack(model: torch.nn.Module, x: Tensor, data: list[Tensor]) -> Way:
    """XNNPACK in int8, weights by channel, through ExecuTorch."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    for batch in data:
        prepared(batch)
    exported = torch.export.export(convert_pt2e(prepared), (x,))
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    loaded = Runtime.get().load_program(program.buffer)  # whose memory the method reads
    method = loaded.load_method("forward")
    return lambda: (loaded, method.execute([x])[0])[1]


def onnxruntime(model: torch.nn.Module, x: Tensor, data: list[Tensor]) -> Way:
    """ONNX Runtime in int8, quantized by its own tool, weights by channel."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"x": batch.numpy()} for batch in data])

        def get_next(self) -> Any:
            return next(self.left, None)

    folder = Path(tempfile.mkdtemp())
    torch.onnx.export(model, (x,), str(folder / "float.onnx"), input_names=["x"], dynamo=False)
    kinds = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    quantize_static(
        str(folder / "float.onnx"), str(folder / "int8.onnx"), Reader(), per_channel=True, **kinds
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(folder / "int8.onnx"), options, providers=["CPUExecutionProvider"])
    given = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def peers(name: str, batch: int, seconds: float) -> dict[str, Any]:
    """A row: float32 and whichever peers are installed; the reason for each that is not."""
    model, shape = build(name)
    x, data = torch.randn(batch, *shape), [torch.randn(batch, *shape) for _ in range(4)]
    row: dict[str, Any] = {"model": name, "batch": batch, "vectors": "peers", "snr": {}, "missing": {}}
    ways: dict[str, Way] = {}
    with torch.no_grad():
        wanted, float32 = model(x), frozen(model)
        ways["float32"] = lambda: float32(x)
        for peer in (xnnpack, onnxruntime):
            try:
                ways[peer.__name__] = peer(model, x, data)
                row["snr"][peer.__name__] = noise_ratio(wanted, ways[peer.__name__]())
            except ImportError as error:
                row["missing"][peer.__name__] = str(error)
        found = rounds(ways, seconds)
    return row | {"ms": {way: 1e3 * one for way, one in found.items()}}


def child(given: argparse.Namespace) -> None:
    """One process: its row as the last line."""
    torch.set_num_threads(given.threads[0])
    make = peers if given.one == "peers" else ours
    row = make(given.models[0], given.batches[0], given.seconds)
    print(json.dumps(row | {"threads": given.threads[0]}))


def started(python: str, one: str, words: list[str], vectors: str, cpus: int) -> dict[str, Any] | None:
    """The row of a process on so many processors, or None if it failed, which is said."""
    # A cache for each kind of vectors, so that what is compiled is what is timed.
    apart = Path(tempfile.gettempdir()) / f"bitfold-conv-{one}-{vectors}"
    here = [python, str(Path(__file__).resolve()), "--one", one, *words]
    done = subprocess.run(
        ["taskset", "-c", f"0-{cpus - 1}", *here],
        env=os.environ | VECTORS[vectors] | {"TORCHINDUCTOR_CACHE_DIR": str(apart)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"{' '.join(words)}: failed\n{done.stderr[-1500:]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def processor() -> str:
    """Its name, as the system says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Every combination that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["resnet", "lite0", "mlp"], choices=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--vectors", nargs="+", default=["native"], choices=list(VECTORS))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each process's rounds")
    parser.add_argument("--peers", help="a python with executorch and onnxruntime beside torch")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return child(given)
    rows: list[dict[str, Any]] = []
    for model in given.models:
        for batch in given.batches:
            for threads in given.threads:
                words = ["--models", model, "--batches", str(batch), "--threads", str(threads)]
                words += ["--seconds", str(given.seconds)]
                found = [started(sys.executable, "ours", words, v, threads) for v in given.vectors]
                found += [started(given.peers, "peers", words, "native", threads)] if given.peers else []
                rows += [row for row in found if row is not None]
                for row in found:
                    print_row(row)
    if given.out:
        about = {"processor": processor(), "torch": torch.__version__, "rows": rows}
        given.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return None


def print_row(row: dict[str, Any] | None) -> None:
    """One line: how many times float32's speed each way has."""
    if row is None:
        return
    base = row["ms"]["float32"]
    ways = [f"{way} {base / ms:.2f}x" for way, ms in row["ms"].items() if way != "float32"]
    where = f"{row['model']}, batch {row['batch']}, {row['threads']} threads, {row['vectors']}"
    print(f"{where}: float32 {base:.3f} ms, {', '.join(ways)}", flush=True)


if __name__ == "__main__":
    main()
