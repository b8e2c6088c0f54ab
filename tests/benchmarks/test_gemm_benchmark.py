"""The GEMM benchmark without a GPU: options, comparison, tables, plot, and what is compiled beforehand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bitfold.codegen import Schedule
from bitfold.formats import format

ROOF = {"read": 4e12, "bf16": 8e14, "fp8": 16e14, "int8": 16e14}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ by its name; they import one another so."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def row(peer: str, format: str, m: int, us: float | None, **more: Any) -> dict[str, Any]:
    beside = {"bf16": ["all"], "humming": ["int4[g128]"]}.get(peer, [])
    shared = {"compute": "bf16", "n": 4096, "k": 4096, "bytes": 8e6, "error": 1e-3, "failed": None}
    return {**shared, "peer": peer, "format": format, "beside": beside, "m": m, "us": us, **more}


def result(script: Any) -> dict[str, Any]:
    rows = [
        row("bf16", "", 1, 16.0, bytes=32e6), row("bf16", "", 4096, 200.0),
        row("humming", "uint4 g128", 1, 9.0), row("humming", "uint4 g128", 4096, 400.0),
        row("bitfold", "int4[g128]", 1, 6.0), row("bitfold", "int4[g128]", 4096, 250.0),
        row("bitfold", "nf4[g64]", 1, 8.0),
        row("bitfold", "nf4[g64]", 4096, None, failed="error 1 is over 0.004"),
    ]  # fmt: skip
    versions = {"card": "Card X", "torch": "2.11", "triton": "3.6", "cuda": "13.0", "driver": "580"}
    finished = script("gemm_rows").finish(rows, ROOF)
    return {**versions, "roof": ROOF, "absent": {"mslk": "no module"}, "rows": finished}


def test_rows_are_held_against_the_roof_and_the_best_of_their_peers(script: Any) -> None:
    found = {(r["peer"], r["format"], r["m"]): r for r in result(script)["rows"]}
    skinny, wide = found["bitfold", "int4[g128]", 1], found["bitfold", "int4[g128]", 4096]
    assert skinny["roof"] == pytest.approx(8e6 / 4e12 * 1e6 / 6.0)
    assert wide["roof"] == pytest.approx(2 * 4096**3 / 8e14 * 1e6 / 250.0)
    assert (skinny["best"], skinny["ratio"]) == ("humming uint4 g128", 1.5)
    assert (wide["best"], wide["ratio"]) == ("bf16", 0.8)
    # No peer stores nf4, so bf16 alone stands beside it; a row without a time has neither.
    assert (found["bitfold", "nf4[g64]", 1]["best"], found["bitfold", "nf4[g64]", 1]["ratio"]) == (
        "bf16",
        2.0,
    )
    assert found["bitfold", "nf4[g64]", 4096]["ratio"] is None
    assert found["bitfold", "nf4[g64]", 4096]["roof"] is None


def test_the_page(script: Any) -> None:
    page = script("plot_gemm").markdown(result(script))
    assert page.startswith(
        "# GEMM with quantized weights on Card X\n\ntorch 2.11, triton 3.6, cuda 13.0, driver 580."
    )
    tail = page[page.index("| format") :]
    assert (
        tail
        == """\
| format | rows | geometric mean | least | least fraction of the roof |
| --- | ---: | ---: | ---: | ---: |
| int4[g128] | M <= 16 | 1.50x | 1.50x (4096x4096 M=1, humming uint4 g128) | 33% |
| int4[g128] | M = 4096 | 0.80x | 0.80x (4096x4096 M=4096, bf16) | 69% |
| nf4[g64] | M <= 16 | 2.00x | 2.00x (4096x4096 M=1, bf16) | 25% |

### int4[g128]: ratio, and fraction of the roof

| N x K | M=1 | M=4096 |
| --- | ---: | ---: |
| 4096x4096 | 1.50x 33% | 0.80x 69% |

### nf4[g64]: ratio, and fraction of the roof

| N x K | M=1 | M=4096 |
| --- | ---: | ---: |
| 4096x4096 | 2.00x 25% | - |

## Microseconds

### 4096 x 4096

|  | M=1 | M=4096 |
| --- | ---: | ---: |
| bf16 | 16.0 | 200.0 |
| humming uint4 g128 | 9.0 | 400.0 |
| bitfold int4[g128] | 6.0 | 250.0 |
| bitfold nf4[g64] | 8.0 | - |

## Without a number

- bitfold nf4[g64], 4096x4096, M=4096: error 1 is over 0.004
- mslk: no module
"""
    )


def test_results_of_several_runs_go_together_if_of_one_card(script: Any) -> None:
    plot = script("plot_gemm")
    first = result(script)
    later = {**first, "rows": [row("humming", "uint4 g128", 1, 3.0)]}
    together = plot.merged([first, later])
    assert len(together["rows"]) == len(first["rows"])
    ours = next(r for r in together["rows"] if r["format"] == "int4[g128]" and r["m"] == 1)
    assert ours["ratio"] == 0.5
    with pytest.raises(SystemExit, match="results of one card go together, not of Card X, Card Y"):
        plot.merged([first, {**first, "card": "Card Y"}])


def test_plot_and_files(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    source = tmp_path / "raw.json"
    source.write_text(json.dumps(result(script)))
    monkeypatch.setattr("sys.argv", ["plot_gemm.py", str(source), "--folder", str(tmp_path / "out")])
    script("plot_gemm").main()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"gemm-card-x.{ending}" for ending in ("json", "md", "png", "svg")]
    assert (tmp_path / "out" / "gemm-card-x.png").read_bytes().startswith(b"\x89PNG")


def test_tables_print(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script("gemm").show(result(script))
    printed = capsys.readouterr().out
    assert "bitfold int4[g128]" in printed and "absent: mslk: no module" in printed


def test_options(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gemm = script("gemm")
    given = gemm.options(["--shapes", "64x128", "--ms", "1", "16", "--peers", "bitfold", "bf16"])
    assert (given.shapes, given.ms, given.peers) == ([(64, 128)], [1, 16], ["bitfold", "bf16"])
    assert gemm.options([]).peers.count("bitfold") == 1
    wrong = {
        "--shapes 64": "'64' is no shape; one reads: 28672x4096",
        "--repeats 3": "--repeats 3 is too few for a median; 9 or more",
        "--peers marlin": "invalid choice: 'marlin'",
    }
    for text, said in wrong.items():
        with pytest.raises(SystemExit):
            gemm.options(text.split())
        assert said in capsys.readouterr().err


def test_every_format_of_a_peer_is_one_of_ours(script: Any) -> None:
    """A misspelt name would leave a format without that peer, silently."""
    ours = {str(format(text)) for text in script("gemm_ours").FORMATS}
    two_operands = set(script("gemm_pairs").LABELS)
    for name, peer in script("gemm_peers").PEERS.items():
        assert set(peer.beside) <= ours | two_operands | {"all"}, name


def test_what_is_compiled_is_what_runs(script: Any) -> None:
    """Each kernel once; parts on `meta` have the strides and dtypes of real ones."""
    ours = script("gemm_ours")
    jobs = ours.jobs_of(["int4[g128]"], [(256, 1024), (512, 1024)], [1, 2, 4096], ours.chooser(None))
    assert len(jobs) == len(set(jobs)) == 2
    fixed = ours.chooser("m16 n64 w2 s3 k1 sum")
    assert fixed(None, 4096) == Schedule(16, 64, 2, 3, 1, "sum")
    for text in ours.FORMATS:
        fmt = ours.spec_of(text, 64, 1024).weight
        real = fmt.quantize(torch.randn(64, 1024)).parts
        shaped = ours.shaped_parts(fmt, 64, 1024)
        assert [(p.shape, p.stride(), p.dtype) for p in shaped] == [
            (p.shape, p.stride(), p.dtype) for p in real
        ]


PICK = "m16 n64 w2 s3 k1 sum"


def test_pairs_are_compiled_and_labelled_alike(script: Any) -> None:
    pairs = script("gemm_pairs")
    specs = {name: str(pairs.spec_of(name, 512, 1024)) for name in pairs.PAIRS}
    assert specs == {
        "fp8 x fp8": "linear 512x1024 bf16 float8_e4m3fn x:float8_e4m3fn",
        "fp8 x fp8 blocks": "linear 512x1024 bf16 float8_e4m3fn[128x128] x:float8_e4m3fn[g128]",
        "int8 x int8": "linear 512x1024 bf16 int8 x:int8",
        "int4 x fp8": "linear 512x1024 bf16 int4[g128,planar256] x:float8_e4m3fn",
        "int4 x int8": "linear 512x1024 bf16 int4[g128,planar256] x:int8",
    }
    jobs = list(pairs.jobs([*pairs.PAIRS], [(512, 1024)], [1, 4096], script("gemm_ours").chooser(None)))
    assert {spec for spec, _ in jobs} == set(specs.values()) and len(jobs) == 2 * len(specs)
    spec = pairs.spec_of("int4 x fp8", 512, 1024)
    alone, both = (pairs.row_of("int4 x fp8", spec, 4, 1000, flag, PICK) for flag in (False, True))
    assert [alone["format"], both["format"]] == ["int4 x fp8", "int4 x fp8, quantizing x"]
    assert both["bytes"] - alone["bytes"] == 4 * 1024 and alone["compute"] == "fp8"


def test_what_x_must_give_is_that_of_its_codes(script: Any) -> None:
    pairs, trial = script("gemm_pairs"), importlib.import_module("bitfold.codegen.trial")
    spec = pairs.spec_of("int8 x int8", 64, 128)
    weights = trial.Weights.of(spec, "cpu")
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    made = pairs.of_x(trial.Trial.of(weights, 3), x)
    exact = x.float() @ weights.decoded[0].T
    assert 0 < (made.reference - exact).norm() < 0.02 * exact.norm()
    wrong = pairs.timed({}, made, lambda: [lambda: exact.to(torch.bfloat16)] * 2, 9)
    assert wrong["failed"].startswith("error 0.0") and "us" not in wrong


def by_operators(inputs: list[torch.Tensor], text: str) -> list[torch.Tensor]:
    """What a kernel computes, by torch."""
    from bitfold.codegen import GemmSpec
    from bitfold.lowering.fused import finish

    spec = GemmSpec.parse(text)
    given = spec.inputs(inputs)
    weights = [
        torch.ops.bitfold.dequantize(list(p), str(spec.weight), spec.k, torch.bfloat16) for p in given.parts
    ]
    return [finish(spec, [given.x.float() @ w.float().T for w in weights], given)]


def test_the_mlp_is_the_same_fused_and_not(script: Any) -> None:
    blocks = script("gemm_blocks")
    torch.manual_seed(0)
    mlp, x = blocks.Mlp.of("int4[g128]", 256, 512, "cpu"), torch.randn(5, 256, dtype=torch.bfloat16)
    want = blocks.plain(x.float(), [w.float() for w in mlp.decoded()])
    copy = blocks.copied(mlp.weights)
    for y in (mlp.fused(x, copy, by_operators), mlp.unfused(x, copy, by_operators)):
        assert (y.float() - want).norm() < 4 * blocks.BOUND * want.norm()
    assert [str(spec).partition(" -> ")[2] for spec in mlp.specs] == ["mul(silu(y0),y1)", "add(y0,e0)"]


def test_the_mlp_is_one_graph(script: Any) -> None:
    """With two kernels, or three, as it is compiled on a GPU."""
    blocks, found = script("gemm_blocks"), []
    mlp, call = blocks.Mlp.of("int4[g128]", 256, 512, "cpu"), torch.ops.bitfold.fused

    def kernels(gm: torch.fx.GraphModule, _: Any) -> Any:
        found.append(
            sum(node.target is call.default for node in gm.graph.nodes)
            or len(gm.graph.find_nodes(op="call_function", target=call))
        )
        return lambda *inputs: (torch.zeros(()),)

    def fused(x: torch.Tensor, weights: Any) -> torch.Tensor:
        return mlp.fused(x, weights, call)

    def unfused(x: torch.Tensor, weights: Any) -> torch.Tensor:
        return mlp.unfused(x, weights, call)

    for one in (fused, unfused):
        torch.compile(one, backend=kernels, fullgraph=True)(torch.randn(1, 256).bfloat16(), mlp.weights)
    assert found == [2, 3]


def test_blocks_are_compiled_beforehand(script: Any) -> None:
    blocks, gemm = script("gemm_blocks"), script("gemm")
    given = gemm.options(["--peers", "mlp", "experts", "bf16", "--ms", "1", "16"])
    jobs = gemm.all_jobs(given)
    assert {spec.partition(" ")[0] for spec, _ in jobs} == {"linear", "grouped"} and len(jobs) == len(
        set(jobs)
    )
    assert sum("mul(silu(y0),y1)" in spec for spec, _ in jobs) == 2
    assert gemm.all_jobs(gemm.options(["--peers", "bf16"])) == []
    row = blocks.row_of("bitfold", "8 experts", 16, 1000)
    assert row["n"] * row["products"] == blocks.HIDDEN and row["format"] == "8 experts int4[g128]"
    assert blocks.row_of("unfused", "MLP", 16, 1000)["beside"] == ["MLP int4[g128]"]


def test_a_loop_over_experts_leaves_out_those_without_tokens(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = script("gemm_blocks")
    build, called = importlib.import_module("bitfold.codegen.triton.build"), []

    def launch(spec: Any, schedule: Any, inputs: Any, *, out: torch.Tensor) -> None:
        called.append(inputs[0].shape[0])
        out.copy_(by_operators(inputs, str(spec))[0])

    monkeypatch.setattr(build, "launch", launch)
    spec = blocks.laid_out("int4[g128]", 64, 256)
    parts = spec.weight.quantize(torch.randn(3, 64, 256)).parts
    x = torch.randn(6, 256, dtype=torch.bfloat16)
    y = blocks.by_loop(spec, parts, x, [0, 2, 2, 6])
    assert called == [2, 4] and y.shape == (6, 64)
    weight = torch.ops.bitfold.dequantize(parts, str(spec.weight), 256, torch.bfloat16)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    torch.testing.assert_close(y, blocks.grouped(x, weight, ends), rtol=2**-6, atol=2**-4)
