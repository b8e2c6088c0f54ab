"""Schedules that were measured: a JSON file a card, one beside the user's other caches, one shipped.

In: a spec, a number of rows, a card. Out: the schedule that was fastest when somebody tuned it, or nothing.

    nvidia_h200-v1.json:  {"linear 4096x4096 bf16 int4[g128,halves256]": {"8": ["m8 n64 w2 s3 k4 sum", 7.1]}}
    lookup(spec, 1, card)   ->   Schedule(8, 64, 2, 3, 4, "sum")
    lookup(spec, 4096, card)   ->   LIBRARY: decode the weight once, then the library's product

What is looked up is the spec without its bias and its epilogue, which cost little beside the weight's bytes:
an entry made for one serves the others. Failing that the same with the other 16-bit activations, and with
one weight where a kernel takes several.

A file is written beside and renamed, by one process at a time, which reads it again first: nobody's entries
are lost. One that cannot be read (truncated, another version) is moved aside by the next write, and one
warning says so. An entry whose schedule does not parse or cannot run the spec is passed over.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from .candidates import bucket, rows_each, rows_of
from .device import Device
from .pipelined import Pipelined, parsed
from .schedule import Schedule
from .spec import CodegenError, GemmSpec

# Of the files' form and of what schedules mean: kernels that change so that old times mislead raise it.
VERSION = 1
LIBRARY = "library"
# Decoding a weight writes four times what reading it takes: no number of rows this small is worth it.
LIBRARY_FROM = 32
# Two or more weights of a kind in one kernel: "2*int4".
_SEVERAL = re.compile(r" \d+\*")
SHIPPED = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Entry:
    """schedule: a schedule's text or LIBRARY; us: microseconds when it was measured."""

    schedule: str
    us: float


@dataclass(frozen=True)
class Table:
    """entries: of a spec's key, of a bucket of M; sources: files that they were taken from."""

    card: str
    entries: Mapping[str, Mapping[int, Entry]] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    def merged(self, newer: Table) -> Table:
        """Both; where both have an entry, the newer one's."""
        found = {name: dict(sizes) for name, sizes in self.entries.items()}
        for name, sizes in newer.entries.items():
            found.setdefault(name, {}).update(sizes)
        return Table(self.card, found, tuple(dict.fromkeys((*self.sources, *newer.sources))))

    def json(self) -> str:
        """One line a spec and bucket, in order, so that two tables can be compared."""
        lines = []
        for name, sizes in sorted(self.entries.items()):
            shown = [f'   "{size}": {json.dumps([e.schedule, e.us])}' for size, e in sorted(sizes.items())]
            lines.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(shown) + "\n  }")
        head = {"version": VERSION, "card": self.card, "sources": list(self.sources)}
        entries = ",\n".join(lines)
        return json.dumps(head, indent=1)[:-2] + ',\n "entries": {' + f"\n{entries}\n }}\n}}\n"

    @classmethod
    def parse(cls, text: str) -> Table:
        """The inverse of `json`; CodegenError if the text says something else."""
        try:
            found = json.loads(text)
            if found["version"] != VERSION:
                raise CodegenError(f"it is of version {found['version']!r}, and this bitfold's is {VERSION}")
            entries = {
                str(name): {int(size): _entry(value) for size, value in sizes.items()}
                for name, sizes in found["entries"].items()
            }
            return cls(str(found["card"]), entries, tuple(str(one) for one in found["sources"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, CodegenError):
                raise
            raise CodegenError(f"it holds no table ({type(error).__name__}: {error})") from error


def _entry(value: object) -> Entry:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise TypeError(f"{value!r} is no schedule and its time")
    return Entry(value[0], float(value[1]))


def key(spec: GemmSpec) -> str:
    """The spec's text without bias and epilogue."""
    return str(spec).partition(" -> ")[0].removesuffix(" bias")


def keys(spec: GemmSpec) -> tuple[str, ...]:
    """Under which names an entry may stand, the best first."""
    own = key(spec)
    names = [own]
    if _SEVERAL.search(own):
        names.append(_SEVERAL.sub(" ", own, count=1))
    other = {"bf16": "f16", "f16": "bf16"}[spec.x]
    names += [name.replace(f" {spec.x} ", f" {other} ", 1) for name in names]
    return tuple(names)


def lookup(spec: GemmSpec, m: int, card: Device) -> Schedule | Pipelined | str | None:
    """What was measured as the fastest for m rows: a schedule, LIBRARY, or None if nobody measured."""
    size = bucket(m)
    for table in tables(card):
        for name in keys(spec):
            entry = table.entries.get(name, {}).get(size)
            found = None if entry is None else _usable(entry, spec, size, card)
            if found is not None:
                return found
    return None


def _usable(entry: Entry, spec: GemmSpec, size: int, card: Device) -> Schedule | Pipelined | str | None:
    if entry.schedule == LIBRARY:
        return LIBRARY if size >= LIBRARY_FROM else None
    try:
        schedule = parsed(entry.schedule)
        schedule.check_arch(card.arch)
    except CodegenError:
        return None
    return schedule if schedule.obstacle(spec) is None else None


@lru_cache(maxsize=16)
def tables(card: Device) -> tuple[Table, ...]:
    """The user's table and the shipped one, of those that there are. Read once; `forget` reads anew."""
    found = [read(path) for path in (user_file(card), shipped_file(card)) if path is not None]
    return tuple(table for table in found if table is not None)


def user_file(card: Device) -> Path:
    """$BITFOLD_CACHE_DIR, else $XDG_CACHE_HOME/bitfold, else ~/.cache/bitfold; a file a card and version."""
    own = os.environ.get("BITFOLD_CACHE_DIR")
    shared = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(own) if own else Path(shared) / "bitfold"
    return folder / "schedules" / f"{card.slug}-v{VERSION}.json"


def shipped_file(card: Device) -> Path | None:
    """The card's own; else that of one with the same compute capability and as many multiprocessors."""
    from .device import device

    own = SHIPPED / f"{card.slug}.json"
    if own.exists():
        return own
    for path in sorted(SHIPPED.glob("*.json")):
        try:
            other = device(Table.parse(path.read_text(encoding="utf-8")).card)
        except (KeyError, CodegenError):
            continue
        if (other.arch, other.multiprocessors) == (card.arch, card.multiprocessors):
            return path
    return None


def read(path: Path) -> Table | None:
    """The table in a file; None if there is no file, or after a warning if it cannot be read."""
    try:
        return Table.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, CodegenError) as error:
        warnings.warn(
            f"the tuned schedules in {path} cannot be read: {error}; shipped or computed ones run instead, "
            "and `bitfold tune` makes the file anew",
            stacklevel=2,
        )
        return None


def update(path: Path, newer: Table) -> Table:
    """Adds to the file what `newer` has, and returns what it then holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        old = _held(path)
        found = newer if old is None else old.merged(newer)
        handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(found.json())
        os.replace(beside, path)
    return found


def _held(path: Path) -> Table | None:
    """What the file holds; one that cannot be read is kept under another name."""
    try:
        return Table.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, CodegenError):
        os.replace(path, path.with_suffix(".unreadable"))
        return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it, however that ends."""
    import fcntl  # where there are GPUs; reading needs none of it

    with open(path.with_suffix(".lock"), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def best_of(card: str, rows: list[dict[str, Any]], source: str) -> Table:
    """A table of the fastest row of each spec and bucket; rows are {spec, m, schedule, us}."""
    found: dict[tuple[str, int], dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        if "us" in row:
            spec = GemmSpec.parse(row["spec"])
            each = rows_each(spec, row["m"])
            found.setdefault((key(spec), bucket(each)), {}).setdefault(each, []).append(row)
    entries: dict[str, dict[int, Entry]] = {}
    for (name, size), by_m in found.items():
        # Times of different M do not compare: those of the one that stands for the bucket, or of the largest.
        best = min(by_m.get(rows_of(size), by_m[max(by_m)]), key=lambda row: float(row["us"]))
        entries.setdefault(name, {})[size] = Entry(best["schedule"], round(best["us"], 2))
    return Table(card, entries, (source,))
