"""The backend on the CPU target, compiled for real: decoding, no compiler, a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import nn

import bitfold as bf
from bitfold.lowering import backend
from bitfold.lowering.cpu import target
from bitfold.lowering.cpu.forms import MOST_ROWS
from bitfold.lowering.tolerance import bound
from bitfold.passes import Trace

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def decode(model: Any, call: Any, steps: int) -> list[int]:
    """A prompt of 16 tokens, then `steps` greedy ones; after the first, a recompile is an error."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=steps + 16)
    tokens, position, out = torch.arange(16)[None], torch.arange(16), []
    for step in range(steps + 1):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            logits = call(tokens, past_key_values=cache, cache_position=position, use_cache=True).logits
        tokens, position = logits[:, -1:].argmax(-1), position[-1:] + 1
        out.append(int(tokens))
    return out


def test_two_hundred_steps_are_two_graphs(llama: Any) -> None:
    traces: list[Trace] = []
    options = {"recipe": "int4[g32]", "trace": traces}
    fast = torch.compile(llama, backend=backend.bitfold, fullgraph=True, options=options)
    right = torch.compile(llama, backend=backend.bitfold, options={**options, "target": "reference"})
    with torch.inference_mode():
        found = decode(llama, fast, 200)
        assert len(traces) == 2
        assert not any(step.misses for trace in traces for step in trace.steps)
        assert found == decode(llama, right, 200)


@pytest.mark.parametrize("recipe", ["int8", "int4[g32]", pytest.param("mxfp4", marks=pytest.mark.slow)])
def test_compiled_sums_are_within_the_tolerance(recipe: str) -> None:
    fc = nn.Linear(192, 80).eval()
    weight = bf.format(recipe).quantize(fc.weight.detach()).dequantize()
    fast = torch.compile(
        fc, backend=backend.bitfold, dynamic=False, options={"recipe": recipe, "target": "cpu"}
    )
    for rows in (1, 3, MOST_ROWS + 1):
        x = torch.randn(rows, 192)
        exact = x.double() @ weight.double().t() + fc.bias.double()
        with torch.inference_mode():
            assert ((fast(x) - exact).abs() <= bound(x, weight, fc.bias)).all(), rows


def test_compiled_bfloat16_is_within_the_tolerance() -> None:
    fc = nn.Linear(192, 80).eval().to(torch.bfloat16)
    weight = bf.format("q4_1").quantize(fc.weight.detach()).dequantize()
    fast = torch.compile(fc, backend=backend.bitfold, dynamic=False, options={"recipe": "q4_1"})
    x = torch.randn(2, 192).to(torch.bfloat16)
    exact = x.double() @ weight.double().t() + fc.bias.double()
    with torch.inference_mode():
        y = fast(x)
    assert y.dtype == torch.bfloat16
    assert ((y - exact).abs() <= bound(x, weight, fc.bias, torch.bfloat16)).all()


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


installed = pytest.mark.skipif(
    not entry_points(group="torch_dynamo_backends", name="bitfold"),
    reason="bitfold is not installed (pip install -e .), so torch cannot know its backend by name",
)

PLAIN_USE = """
    import sys, torch
    torch.manual_seed(0)
    fc = torch.nn.Linear(64, 32).eval()
    assert "bitfold" not in sys.modules
    fast = torch.compile(fc, backend="bitfold", options={"recipe": "int4[g32]"})
    x = torch.randn(2, 64)
    with torch.inference_mode():
        print("difference", float((fast(x) - fc(x)).abs().max()))
"""


@installed
def test_a_fresh_process_needs_no_import() -> None:
    done = run(PLAIN_USE)
    assert done.returncode == 0, done.stderr
    assert 0.001 < float(done.stdout.split()[-1]) < 0.5  # quantized, and the same layer


@installed
def test_without_a_compiler_it_warns_and_is_right() -> None:
    done = run(PLAIN_USE, CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert "there is no C++ compiler (install g++, or set CXX to one)" in done.stderr
    assert "correct and slow" in done.stderr
    assert 0.001 < float(done.stdout.split()[-1]) < 0.5


def test_caches_of_graphs_know_the_processors_vectors() -> None:
    """Inductor keeps C++ for vectors of one width, and compiled for wider ones it writes past its buffers."""
    tag = "import bitfold.lowering, torch; print(torch.compiler.config.cache_key_tag)"
    found = [
        subprocess.run(
            [sys.executable, "-c", tag],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for capability in ("default", torch.backends.cpu.get_cpu_capability().lower())
    ]
    assert "bitfold:" in found[0] and found[0] != found[1]


def test_a_slower_way_is_said_once() -> None:
    """No kernel multiplies float8 by float8: activations are rounded, and become floats again."""
    target._say_once.cache_clear()
    model, x = bf.quantize(nn.Linear(64, 32).eval(), "fp8_dynamic"), torch.randn(2, 64)
    says = "no CPU kernel multiplies activations in float8_e4m3fn: .*; they become floats first"
    with torch.inference_mode():
        with pytest.warns(UserWarning, match=says):
            y = torch.compile(model, backend="bitfold", options={"recipe": "none"})(x)
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="no CPU kernel")
            torch.compile(model, backend="bitfold", options={"recipe": "none"})(x[:1])
        torch.testing.assert_close(y, model(x))
