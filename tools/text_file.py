"""A file that appears whole or not at all.

In: a path and a text, or bytes. Out: the file; what was there before stays until the new one is complete,
also when the person at the keyboard stops the program.

    write_text("out/page.html", page)   ->  Path("out/page.html")
"""

from __future__ import annotations

import os
from pathlib import Path

from ..lowering.files.paths import FileError, place_of


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 and return the path; a lone surrogate, which has no bytes there, goes out as its escape.

    Raises FileError, one sentence, if nothing can be written at `path`.
    """
    return write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """The same for bytes."""
    place = place_of(path)
    if place.is_symlink():
        place = place.resolve()  # the link stays, and what it points to is new
    beside = place.with_name(f"{place.name[:40]}.{os.getpid()}.part")
    try:
        beside.write_bytes(data)
        os.replace(beside, place)
    except OSError as error:
        raise FileError(f"{place} cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
    return Path(path)
