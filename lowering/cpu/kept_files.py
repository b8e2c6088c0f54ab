"""A folder of small files that does not grow: what was not asked for longest goes first.

In: a path and a text. Out: the text, as it was written, or nothing.

    write(folder / "3f9c.json", text);  read(folder / "3f9c.json")  ->  text

A file begins with a digest of what follows, so that half a file, or one that somebody changed, is none. Its
time is that of its last reading. Processes may share the folder: a file is written beside its place and
renamed, and one that another process has removed is one that was never there.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ...formats import BitfoldError

SIZE = "BITFOLD_KEPT_FRAMES_MB"
DEFAULT = 64
_BESIDE = "beside-"
_LEFT_AFTER = 3600.0  # seconds; whoever began a file so long ago will not finish it


def limit() -> int:
    """Bytes that a folder may hold: $BITFOLD_KEPT_FRAMES_MB, 64 if it is not set; with 0 nothing is kept."""
    told = os.environ.get(SIZE, str(DEFAULT))
    try:
        found = float(told)
    except ValueError:
        found = -1.0
    if not 0 <= found < 2**40:
        raise BitfoldError(f"{SIZE} is a number of megabytes, 0 or more, not {told!r}")
    return int(found * 2**20)


def read(path: Path) -> str:
    """What was written there, which is now the last that would be removed. OSError if there is nothing,
    ValueError if it is something else."""
    digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    if digest != _digest(text):
        raise ValueError(f"{path} is not what was written there")
    with suppress(OSError):
        os.utime(path)
    return text


def write(path: Path, text: str) -> None:
    """Put it there, and remove what is too much. OSError if the folder cannot be written."""
    most = limit()
    if most == 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=_BESIDE, delete=False, encoding="utf-8"
    ) as beside:
        try:
            beside.write(f"{_digest(text)}\n{text}")
            beside.close()
            os.replace(beside.name, path)
        except OSError:
            Path(beside.name).unlink(missing_ok=True)
            raise
    _trim(path.parent, most, path)


def _trim(folder: Path, most: int, newest: Path) -> None:
    """Remove files, the oldest first, until the others fit; `newest` stays even if it alone does not."""
    found = []
    for path in folder.iterdir():
        with suppress(OSError):
            told = path.stat()
            if path.name.startswith(_BESIDE):
                if time.time() - told.st_mtime > _LEFT_AFTER:
                    path.unlink()
            elif path.suffix == newest.suffix:
                found.append((path != newest, -told.st_mtime_ns, told.st_size, path))
    held = 0
    for _, _, size, path in sorted(found):
        held += size
        if held > most and path != newest:
            with suppress(OSError):
                path.unlink()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
