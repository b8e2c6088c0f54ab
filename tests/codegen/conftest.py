"""What the tests of generated kernels share: a process that interprets them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Interpret = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """`interpreter.answer`, in another process; a traceback there is an AssertionError here."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreter.py")
    loader = importlib.util.spec_from_file_location("interpreter", script)
    assert loader is not None and loader.loader is not None
    channel = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(channel)
    search = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": search},
    )
    assert process.stdin is not None and process.stdout is not None
    asks, answers = process.stdin, process.stdout

    def ask(**job: Any) -> dict[str, Any]:
        channel.send(job, asks)
        told = channel.receive(answers)
        assert isinstance(told, dict), told
        return told

    yield ask
    asks.close()
    process.wait(timeout=60)
