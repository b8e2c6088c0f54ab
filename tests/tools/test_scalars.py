"""Scalars of training: figures of each rounded edge, read back by TensorBoard's own reader."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bitfold.formats import format
from bitfold.formats.errors import BitfoldError
from bitfold.lowering import Pipeline
from bitfold.passes.scopes.program import capture
from bitfold.tools.scalars import Scalars, rounding

X = (torch.randn(8, 64, generator=torch.Generator().manual_seed(1)),)


def prepared():
    torch.manual_seed(0)
    gm = capture(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), X)
    Pipeline.parse("annotate{recipe=int8_dynamic},fake_quantize").run(gm)
    return gm


def test_each_rounded_edge_is_told() -> None:
    gm = prepared()
    found = rounding(gm, X)
    assert set(found) == {
        f"{layer}/{edge}/{figure}"
        for layer in ("0", "2")
        for edge in ("weight", "input")
        for figure in ("sqnr_db", "clipped", "largest")
    }
    weight = gm.get_parameter("0.weight").detach()
    rounded = format("int8").fake_quantize(weight)
    by_hand = 10 * math.log10(weight.square().sum() / (rounded - weight).square().sum())
    assert found["0/weight/sqnr_db"] == pytest.approx(by_hand, abs=1e-3)
    assert found["0/input/largest"] == pytest.approx(float(X[0].abs().max()))
    assert found["0/weight/clipped"] == 0.0
    with pytest.raises(BitfoldError, match="nothing in this graph is fake-quantized"):
        rounding(capture(nn.Linear(64, 4).eval(), X), X)


def test_looking_changes_neither_statistics_nor_random_numbers() -> None:
    gm = capture(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.5)), X)
    Pipeline.parse("annotate{recipe=int8_dynamic},fake_quantize").run(gm)
    statistics = {name: held.clone() for name, held in gm.named_buffers()}
    assert statistics
    state = torch.get_rng_state()
    rounding(gm, X)
    assert torch.equal(torch.get_rng_state(), state)
    for name, held in gm.named_buffers():
        assert torch.equal(held, statistics[name]), name


def test_tensorboard_reads_what_was_written(tmp_path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="NO TENSORBOARD: what it reads of a training run is not tested",
    )
    gm = prepared()
    parameters = [p for p in gm.parameters() if p.is_floating_point()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    losses = []
    with Scalars(tmp_path) as log:
        for step in range(4):
            loss = gm(*X).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            log.write(step, {"loss": loss.detach()})
            log.rounding(step, gm, X)
    assert losses[-1] < losses[0], "it trains"
    read = reader.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.value for event in read.Scalars("loss")] == pytest.approx(losses, rel=1e-6)
    assert [event.step for event in read.Scalars("2/input/sqnr_db")] == [0, 1, 2, 3]


def test_without_tensorboard_one_sentence_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(BitfoldError, match=r"pip install 'bitfold\[tensorboard\]'"):
        Scalars(tmp_path)
