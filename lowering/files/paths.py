"""Where a file shall be written or read: a path checked before any work is done for it.

In: what a user gave as a path. Out: a `Path`, or one sentence about what is wrong with it.

    place_of("out/model.safetensors")        ->  Path("out/model.safetensors"), if there is a folder out
    place_of(None), place_of("file.txt/x")   ->  FileError
"""

from __future__ import annotations

import os
from pathlib import Path

from ...formats import BitfoldError


class FileError(BitfoldError):
    """A file that cannot be written or read: what is wrong with it, in one sentence."""


def place_of(given: object) -> Path:
    """The path, if a file can be written there. Raises FileError; nothing is touched."""
    place = named(given)
    if not place.name:
        raise FileError(f"{str(given)!r} names no file; give the path of a file, such as 'model.safetensors'")
    try:
        why = _obstacle(place)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        why = error.strerror or str(error)
    if why:
        raise FileError(f"{_short(place)} cannot be written: {why}")
    return place


def _obstacle(place: Path) -> str:
    """What stands in the way of a file at `place`; "" if nothing does."""
    if place.is_dir():
        return "it is a folder; give the path of a file in it"
    if place.exists() and not place.is_file():
        return "it is a device, a pipe or a socket; give the path of a file"
    if place.parent.is_dir():
        return ""
    if place.parent.exists():
        return f"{place.parent} is a file; give a path in a folder"
    return f"there is no folder {_short(place.parent)}; make it first"


def named(given: object) -> Path:
    """The path that a text, bytes or a path object names. Raises FileError for anything else."""
    if not isinstance(given, str | bytes | os.PathLike):
        raise FileError(f"a file's path is text or a pathlib.Path, not a {type(given).__name__}")
    text = os.fsdecode(given)
    if "\0" in text:
        raise FileError(f"{text!r:.80} is no path: it has a zero byte in it")
    return Path(text)


def is_file(place: Path) -> bool:
    """Whether there is a file. Raises FileError for a path that the system does not take."""
    try:
        return place.is_file()
    except OSError as error:
        raise FileError(f"{_short(place)} cannot be read: {error.strerror or error}") from error


def _short(place: Path) -> str:
    text = str(place)
    return text if len(text) <= 80 else f"{text[:77]}..."
