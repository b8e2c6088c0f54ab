"""GGUF blocks read as they are: the same values, to the last bit, as the gguf package gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitfold.formats import Quantized, format

gguf = pytest.importorskip("gguf")


def blocks_of(kind: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(raw blocks uint8 [N, K/32, bytes], the package's own decoding)."""
    kind = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(x, kind)
    return raw.reshape(x.shape[0], x.shape[1] // 32, -1), gguf.quants.dequantize(raw, kind)


def halves(raw: np.ndarray, at: int) -> torch.Tensor:
    """float16 field of every block."""
    return torch.from_numpy(raw[..., at : at + 2].copy().view(np.float16)[..., 0])


def codes(raw: np.ndarray, start: int) -> torch.Tensor:
    return torch.from_numpy(raw[..., start:].reshape(raw.shape[0], -1).copy())


@pytest.fixture
def x() -> np.ndarray:
    spread = np.logspace(-4, 3, 24)[:, None]
    return (np.random.default_rng(5).normal(size=(24, 192)) * spread).astype(np.float32)


def test_q4_1(x: np.ndarray) -> None:
    raw, want = blocks_of("Q4_1", x)
    f = format("q4_1[planar]")  # its bytes hold codes j and j + 16: planar in groups of 32
    q = Quantized.from_parts(f, [codes(raw, 4), halves(raw, 0), halves(raw, 2)], 192)
    np.testing.assert_array_equal(q.dequantize().numpy(), want)
    np.testing.assert_array_equal(f.relayout(q, "packed").dequantize().numpy(), want)


def test_q4_0(x: np.ndarray) -> None:
    raw, want = blocks_of("Q4_0", x)
    f = format("q4_0[planar]")
    signed = codes(raw, 2) ^ 0x88  # offset by 8 there, two's complement here
    np.testing.assert_array_equal(
        Quantized.from_parts(f, [signed, halves(raw, 0)], 192).dequantize().numpy(), want
    )


def test_q8_0(x: np.ndarray) -> None:
    raw, want = blocks_of("Q8_0", x)
    q = Quantized.from_parts(format("q8_0"), [codes(raw, 2), halves(raw, 0)], 192)
    np.testing.assert_array_equal(q.dequantize().numpy(), want)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantizing_is_as_good_as_theirs(x: np.ndarray, kind: str) -> None:
    """Not the same codes: theirs come from the unrounded scale, ours from the one that is stored."""
    _, theirs = blocks_of(kind, x)
    ours = format(kind.lower()).fake_quantize(torch.from_numpy(x)).numpy()
    error, other = (np.square(y - x).mean(1) / np.square(x).mean(1) for y in (ours, theirs))
    assert np.sqrt(error.mean() / other.mean()) < 1.01
