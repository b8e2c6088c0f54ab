"""Windows are spread over the whole text, the same each time, and a text that was cut is noticed."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("text_windows")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text of 1000 windows of 16 tokens and a rest; each token is the number of its window."""
    tokens = np.append(np.repeat(np.arange(1000), 16), [7, 7, 7]).astype(np.uint16)
    np.save(tmp_path / "train.npy", tokens)
    return tmp_path


def test_windows_are_spread_over_all_of_the_text(script: Any, folder: Path) -> None:
    found = script.windows(folder, "train", 128, 16)
    assert found.shape == (128, 16) and found.dtype == torch.int64
    assert (found == found[:, :1]).all()  # whole windows, none across a border
    places = found[:, 0]
    assert len(places.unique()) == 128
    # Uniform draws: of 128 windows 12.8 are expected in each tenth of the text; fewer than 3 or more than 28
    # have a chance below 1 in 1000.
    counts = torch.histc(places.float(), 10, 0, 1000)
    assert int(counts.min()) >= 3 and int(counts.max()) <= 28
    # Their mean place is the middle of the text, within three standard errors (1000 / sqrt(12 * 128) each).
    assert abs(float(places.float().mean()) - 499.5) < 3 * 1000 / (12 * 128) ** 0.5


def test_windows_are_the_same_each_time(script: Any, folder: Path) -> None:
    first = script.windows(folder, "train", 64, 16)
    assert torch.equal(first, script.windows(folder, "train", 64, 16))
    assert not torch.equal(first, script.windows(folder, "train", 64, 16, seed=1))
    # More windows hold the fewer: what a few calibrate for is part of what many do.
    more = script.windows(folder, "train", 200, 16)
    assert set(first[:, 0].tolist()) < set(more[:, 0].tolist())


def test_all_windows_and_too_many(script: Any, folder: Path) -> None:
    assert torch.equal(script.windows(folder, "train", 0, 16)[:, 0], torch.arange(1000))
    with pytest.raises(ValueError, match="1001 windows are asked for, of a text that has 1000"):
        script.windows(folder, "train", 1001, 16)


def test_a_text_that_was_cut_is_noticed(script: Any, folder: Path) -> None:
    whole = np.load(folder / "train.npy")
    beside = {"train": hashlib.sha256(whole.tobytes()).hexdigest()}
    (folder / "splits.json").write_text(json.dumps(beside))
    assert script.same_text(folder, ("train",), folder)
    np.save(folder / "train.npy", whole[:2000])
    assert not script.same_text(folder, ("train",), folder)


def test_the_benchmarks_draw_by_these(script: Any) -> None:
    for name in ("ptq", "search"):
        assert importlib.import_module(name).windows is script.windows
