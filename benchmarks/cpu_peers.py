"""Single linear layers by what a user would pick instead: rows of the table of `cpu.py`.

In: a peer's name, shapes, rows of x. Out: a row each, as the last line, or why the peer is absent.

    python benchmarks/cpu.py --peers PYTHON ...    (which has torchao, onnxruntime, onnx, executorch)

ONNX Runtime and torchao with float activations (`int8`, `int4[g64]`) or with those in codes (`int8 x int8`),
XNNPACK through ExecuTorch with activations in codes by row. Weights are rotated past the cache as ours are:
several sessions, methods, modules. ONNX Runtime and XNNPACK choose their vectors by themselves, torch and
bitfold as ATEN_CPU_CAPABILITY says. llama.cpp has no call for one product through llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cpu import PAST_CACHE, best
from torch import Tensor, nn

Calls = list[Callable[[], Any]]
# Sessions and methods take some milliseconds each to make.
MOST_COPIES = 400


def onnxruntime(kind: str, linear: nn.Linear, x: Tensor, copies: int) -> Calls:
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = Path(tempfile.mkdtemp())
    plain, made = folder / "float.onnx", folder / "made.onnx"
    torch.onnx.export(linear, (x,), str(plain), input_names=["x"], dynamo=False)
    if kind == "int8 x int8":
        quantize_dynamic(str(plain), str(made), per_channel=True, weight_type=QuantType.QInt8)
    else:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        graph = onnx.load(str(plain))
        assert [node.op_type for node in graph.graph.node] == ["MatMul"]
        maker = MatMulNBitsQuantizer(graph, block_size=64, is_symmetric=True, accuracy_level=1)
        maker.process()
        maker.model.save_model_to_file(str(made))
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads of one session that wait for work by spinning would slow down the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    given = {"x": x.numpy()}
    sessions = [
        ort.InferenceSession(str(made), options, providers=["CPUExecutionProvider"]) for _ in range(copies)
    ]
    return [lambda s=s: torch.from_numpy(s.run(None, given)[0]) for s in sessions]


def xnnpack(kind: str, linear: nn.Linear, x: Tensor, copies: int) -> Calls:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    prepared = prepare_pt2e(torch.export.export(linear, (x,)).module(), XNNPACKQuantizer().set_global(config))
    prepared(x)
    exported = torch.export.export(convert_pt2e(prepared), (x,))
    buffer = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer
    programs = [Runtime.get().load_program(buffer) for _ in range(copies)]  # whose memory methods read
    methods = [program.load_method("forward") for program in programs]
    return [lambda m=m: (programs, m.execute([x])[0])[1] for m in methods]


def torchao(kind: str, linear: nn.Linear, x: Tensor, copies: int) -> Calls:
    import copy

    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    quantize_(linear, Int8WeightOnlyConfig() if kind == "int8" else Int8DynamicActivationInt8WeightConfig())
    run = torch.compile(lambda module, x: module(x))
    return [lambda m=m: run(m, x) for m in [copy.deepcopy(linear) for _ in range(copies)]]


PEERS: dict[str, tuple[Callable[..., Calls], str]] = {
    "ONNX Runtime int4[g64]": (onnxruntime, "int4[g64]"),
    "ONNX Runtime int8 x int8": (onnxruntime, "int8 x int8"),
    "XNNPACK int8 x int8": (xnnpack, "int8 x int8"),
    "torchao int8": (torchao, "int8"),
    "torchao int8 x int8": (torchao, "int8 x int8"),
}
BYTES = {"int4[g64]": 4 / 8 + 4 / 64, "int8": 1.0, "int8 x int8": 1.0}


def rows(
    peer: str, shapes: Sequence[tuple[int, int]], ms: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Microseconds and bytes of each product, and how far it is from the float32 one."""
    make, kind = PEERS[peer]
    found = []
    for n, k in shapes:
        size = n * k * BYTES[kind]
        copies = min(MOST_COPIES, max(2, int(PAST_CACHE / size)))
        for m in ms:
            torch.manual_seed(0)
            linear, x = nn.Linear(k, n, bias=False).eval(), torch.randn(m, k)
            exact = linear(x)
            calls = make(kind, linear, x, copies)
            y = calls[0]()
            error = float((y - exact).norm() / exact.norm())
            assert error < 0.2, (peer, n, k, m, error)
            row = {"format": peer, "n": n, "k": k, "m": m, "bytes": size, "rounding": error}
            found.append(row | {"us": best(calls, seconds) * 1e6})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=list(PEERS), required=True)
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--ms", nargs="+", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in given.shapes)]
    with torch.no_grad():
        print(json.dumps(rows(given.one, shapes, given.ms, given.seconds)))


if __name__ == "__main__":
    main()
