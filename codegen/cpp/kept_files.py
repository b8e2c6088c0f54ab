"""Folders of files that do not grow: what was not used longest goes first.

In: a path and a file or a text. Out: the file in its place, and what is too much is gone.

    put(beside / "made.so", folder / "c3f9.so", KERNELS);  used(folder / "c3f9.so")
    write(folder / "3f9c.json", text, FRAMES);  read(folder / "3f9c.json")  ->  text

A file's time is that of its last use. Processes may share a folder: a file is made beside its place and
renamed, and one that another process has removed is one that was never there (a library that was loaded stays
loaded). A text begins with a digest of what follows, so that half a file, or one that somebody changed, is
none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...formats import BitfoldError

BESIDE = "beside-"
_LEFT_AFTER = 3600.0  # seconds; whoever began a file so long ago will not finish it


@dataclass(frozen=True)
class Bound:
    """variable: of the environment, that says how many megabytes a folder may hold; default: if it is not
    set; spared: seconds after its last use in which a file stays: another process may be about to load it."""

    variable: str
    default: int
    spared: float = 0.0

    def bytes(self) -> int:
        """That many; 0 if nothing is to be kept. BitfoldError where the variable is no such number."""
        told = os.environ.get(self.variable) or str(self.default)
        try:
            found = float(told)
        except ValueError:
            found = -1.0
        if not 0 <= found < 2**40:
            raise BitfoldError(f"{self.variable} is a number of megabytes, 0 or more, not {told!r}")
        return int(found * 2**20)


FRAMES = Bound("BITFOLD_KEPT_FRAMES_MB", 64)
KERNELS = Bound("BITFOLD_KEPT_KERNELS_MB", 256, spared=60.0)


def used(path: Path) -> None:
    """It is used now, so that others go first."""
    with suppress(OSError):  # a folder that is only read
        os.utime(path)


def put(made: Path, path: Path, bound: Bound, held: Collection[Path] = ()) -> None:
    """Rename a file of the same disk to its place, and remove what is too much there, but for this one and
    those that are held. OSError if the folder cannot be written."""
    os.replace(made, path)
    used(path)
    _trim(path.parent, path.suffix, bound, {path, *held})


def read(path: Path) -> str:
    """What was written there. OSError if there is nothing, ValueError if it is something else."""
    digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    if digest != _digest(text):
        raise ValueError(f"{path} is not what was written there")
    used(path)
    return text


def write(path: Path, text: str, bound: Bound) -> None:
    """Put a text there, if anything is to be kept. OSError if the folder cannot be written."""
    if bound.bytes() == 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=BESIDE, delete=False, encoding="utf-8"
    ) as beside:
        try:
            beside.write(f"{_digest(text)}\n{text}")
            beside.close()
            put(Path(beside.name), path, bound)
        except OSError:
            Path(beside.name).unlink(missing_ok=True)
            raise


def _trim(folder: Path, suffix: str, bound: Bound, held: Collection[Path]) -> None:
    """Remove files, those first that were not used longest, until the others fit; what is held or spared
    counts, and stays even if it does not fit."""
    found, now = [], time.time()
    for path in folder.iterdir():
        with suppress(OSError):
            told = path.stat()
            if path.name.startswith(BESIDE):
                if now - told.st_mtime > _LEFT_AFTER:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.suffix == suffix:
                free = path not in held and now - told.st_mtime >= bound.spared
                found.append((free, -told.st_mtime_ns, told.st_size, path))
    most, total = bound.bytes(), 0
    for free, _, size, path in sorted(found):
        total += size
        if total > most and free:
            with suppress(OSError):
                path.unlink()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
