"""What every test shares: a fixed seed, no network, and a loud skip for what this machine lacks."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What tests of several folders use stands beside this.
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from hypothesis import settings

settings.register_profile("bitfold", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("bitfold")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield


@pytest.fixture
def at_once() -> Callable[..., list[str]]:
    """Run one text of Python in several processes, each with its own words, and give what each said last. The
    text prints "ready" and reads a line before what is to happen in all of them at the same time."""

    def run(text: str, words: Sequence[Sequence[str]], **more: str) -> list[str]:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", text, *own],
                env={**os.environ, **more},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for own in words
        ]
        for one in started:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        for one in started:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
        said = [one.communicate(timeout=120)[0] for one in started]
        assert [one.returncode for one in started] == [0] * len(started)
        return said

    return run
