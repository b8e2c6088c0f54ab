"""Windows of the texts that corpus.py makes: for calibration and for judging, spread over a whole split.

In: a folder of train.npy, validation.npy, test.npy (uint16). Out: int64 token ids [count, length].

    windows("out/lm", "train", 256)       256 of the split's 59,011 windows, drawn by a fixed seed
    same_text("out/lm", ("train",))       whether these are the tokens that the committed model was trained on

A split's documents lie in it source by source (Brown, the Bible, then documentation), so its beginning is not
like the whole: windows that are taken from there calibrate for another text than the model is judged on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from small_llama import FOLDER
from torch import Tensor

LENGTH = 256


def chosen(total: int, count: int, seed: int = 0) -> np.ndarray:
    """`count` of `total` places, sorted, none twice, each as likely as any other; all of them if 0."""
    if count < 0 or count > total:
        raise ValueError(f"{count} windows are asked for, of a text that has {total}")
    return np.sort(np.random.default_rng(seed).permutation(total)[: count or total])


def windows(folder: str | Path, split: str, count: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Windows that begin at multiples of `length`; the same ones each time."""
    ids = np.load(Path(folder) / f"{split}.npy", mmap_mode="r")
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    return torch.from_numpy(whole[chosen(len(whole), count, seed)].astype(np.int64))


def same_text(folder: str | Path, splits: Sequence[str], model: str | Path = FOLDER) -> bool:
    """Whether the tokens are those whose hashes lie beside the model (splits.json)."""
    known = json.loads((Path(model) / "splits.json").read_text(encoding="utf-8"))
    return all(
        hashlib.sha256(np.load(Path(folder) / f"{split}.npy", mmap_mode="r").tobytes()).hexdigest()
        == known[split]
        for split in splits
    )
