"""What the tests of generated kernels share: a process that interprets them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# What several of these tests use stands beside them.
sys.path.insert(0, str(Path(__file__).parent))
import interpreter

Interpret = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """The functions of `interpreter.py`, in another process; a traceback there is an AssertionError here."""
    pytest.importorskip("triton")
    search = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", interpreter.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": search},
    )
    assert process.stdin is not None and process.stdout is not None
    asks, answers = process.stdin, process.stdout

    def ask(**job: Any) -> dict[str, Any]:
        interpreter.send(job, asks)
        told = interpreter.receive(answers)
        assert isinstance(told, dict), told
        return told

    yield ask
    asks.close()
    process.wait(timeout=60)
