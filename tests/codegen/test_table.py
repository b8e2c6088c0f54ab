"""Tables of measured schedules: found again, merged, never in a kernel's way when a file is broken."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitfold.codegen import CodegenError, GemmSpec, Schedule, choose
from bitfold.codegen.choose import forget, unmeasured
from bitfold.codegen.device import device, from_properties
from bitfold.codegen.table import (
    LIBRARY,
    SHIPPED,
    Entry,
    Table,
    best_of,
    key,
    keys,
    lookup,
    shipped_file,
    update,
    user_file,
)

H200 = device("NVIDIA H200")
SPEC = GemmSpec.parse("linear 512x1024 bf16 int4[g128,halves256]")
FAST, OTHER = "m8 n32 w1 s2 k2 sum", "m8 n16 w1 s4 k1 sum"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user with no tables yet."""
    monkeypatch.setenv("BITFOLD_CACHE_DIR", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def table(**entries: str) -> Table:
    """Entries of SPEC: b8="..." is that of bucket 8."""
    return Table(
        H200.name, {key(SPEC): {int(b[1:]): Entry(text, 1.5) for b, text in entries.items()}}, ("a",)
    )


def kept(found: Table) -> None:
    update(user_file(H200), found)
    forget()


def test_a_table_reads_as_it_was_written() -> None:
    found = table(b8=FAST, b64=LIBRARY)
    assert Table.parse(found.json()) == found
    assert Table.parse(Table("card").json()) == Table("card")
    assert found.json() == (
        '{\n "version": 1,\n "card": "NVIDIA H200",\n "sources": [\n  "a"\n ],\n "entries": {\n'
        '  "linear 512x1024 bf16 int4[g128,halves256]": {\n'
        '   "8": ["m8 n32 w1 s2 k2 sum", 1.5],\n   "64": ["library", 1.5]\n  }\n }\n}\n'
    )


def test_what_was_measured_is_chosen_for_its_bucket_and_no_other() -> None:
    kept(table(b8=FAST, b64=LIBRARY, b512=OTHER))
    assert str(choose(SPEC, 1)) == str(choose(SPEC, 8)) == FAST
    assert choose(SPEC, 9) == unmeasured(SPEC, 16, H200)
    assert choose(SPEC, 33) is None and choose(SPEC, 64) is None and choose(SPEC, 65) is not None
    assert str(choose(SPEC, 512)) == OTHER and choose(SPEC, 4096) is None


def test_the_choice_is_looked_up_once() -> None:
    first = choose(SPEC, 3)
    kept_before_forget = table(b8=OTHER)
    update(user_file(H200), kept_before_forget)
    assert choose(SPEC, 5) is first
    forget()
    assert str(choose(SPEC, 5)) == OTHER


def test_the_library_never_takes_a_few_rows() -> None:
    """Decoding writes the weight four times over; and a lowering that asks for one row wants a kernel."""
    kept(table(b8=LIBRARY, b16=LIBRARY, b32=LIBRARY))
    assert choose(SPEC, 1) is not None and choose(SPEC, 16) is not None and choose(SPEC, 17) is None


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("linear 512x1024 bf16 int4[g128,halves256] bias", ["linear 512x1024 {} int4[g128,halves256]"]),
        ("linear 512x1024 f16 int8[halves128]", ["linear 512x1024 {} int8[halves128]"]),
    ],
)
def test_what_does_not_matter_is_left_out_of_the_key(text: str, names: list[str]) -> None:
    spec = GemmSpec.parse(text)
    other = "f16" if spec.x == "bf16" else "bf16"
    assert keys(spec) == (*(n.format(spec.x) for n in names), *(n.format(other) for n in names))


def test_an_entry_serves_the_other_activations_where_it_can() -> None:
    kept(Table(H200.name, {key(SPEC): {8: Entry("m8 n32 w1 s2 k2 lane", 1.0), 16: Entry(FAST, 1.0)}}))
    half = GemmSpec(SPEC.weight, SPEC.n, SPEC.k, "f16", bias=True)
    # bfloat16 scales times int4 are no float16, so that schedule cannot run; the next can.
    assert lookup(half, 8, H200) is None and str(lookup(half, 16, H200)) == FAST


@pytest.mark.parametrize(
    "text", ["", "m8", "m8 n64 w2 s3 k1 end", "m8 n64 w2 s3 k999 sum", "m8 n24 w2 s3 k1 sum"]
)
def test_an_entry_that_cannot_run_is_passed_over(text: str) -> None:
    kept(table(b8=text, b16=FAST))
    assert choose(SPEC, 1) == unmeasured(SPEC, 8, H200)
    assert str(choose(SPEC, 16)) == FAST


def test_the_users_table_comes_before_the_shipped_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bitfold.codegen.table.SHIPPED", tmp_path)
    (tmp_path / "nvidia_h200.json").write_text(table(b8=OTHER, b16=OTHER).json())
    kept(table(b8=FAST))
    assert str(choose(SPEC, 1)) == FAST and str(choose(SPEC, 16)) == OTHER


BROKEN = {
    "truncated": lambda: table(b8=FAST).json()[:-20],
    "empty": lambda: "",
    "no JSON": lambda: "schedules",
    "another version": lambda: table(b8=FAST).json().replace('"version": 1', '"version": 99'),
    "no version": lambda: "{}",
    "a list": lambda: "[1]",
    "no entries": lambda: '{"version": 1, "card": "x", "sources": []}',
    "other entries": lambda: '{"version": 1, "card": "x", "sources": [], "entries": {"a": {"8": "m8"}}}',
    "a word for a bucket": lambda: '{"version":1,"card":"x","sources":[],"entries":{"a":{"b":["m",1]}}}',
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_one_warning_and_made_anew(what: str) -> None:
    path = user_file(H200)
    path.parent.mkdir(parents=True)
    path.write_text(BROKEN[what]())
    with pytest.warns(UserWarning, match="cannot be read.*`bitfold tune` makes the file anew") as told:
        assert choose(SPEC, 1) == unmeasured(SPEC, 8, H200)
    assert len(told) == 1 and str(path) in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(SPEC, 64)  # the file is read once
        kept(table(b8=FAST))
        assert str(choose(SPEC, 1)) == FAST
    assert path.with_suffix(".unreadable").read_text() == BROKEN[what]()


def test_bytes_that_are_no_text_and_a_folder_in_its_place() -> None:
    path = user_file(H200)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert choose(SPEC, 1) is not None
    kept(table(b8=FAST))
    path.unlink()
    path.mkdir()
    forget()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert choose(SPEC, 1) is not None


def _write(path: str, start: int) -> None:
    for i in range(start, start + 20):
        name = key(GemmSpec(SPEC.weight, 64 * (i + 1), SPEC.k))
        update(Path(path), Table(H200.name, {name: {8: Entry(FAST, float(i))}}, (str(start),)))


def test_processes_that_write_at_once_lose_nothing(home: Path) -> None:
    path = user_file(H200)
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=_write, args=(str(path), 20 * i)) for i in range(4)]
    for one in running:
        one.start()
    for one in running:
        one.join()
        assert one.exitcode == 0
    found = Table.parse(path.read_text())
    assert {e[8].us for e in found.entries.values()} == set(map(float, range(80)))
    assert sorted(found.sources) == ["0", "20", "40", "60"]
    assert not list(path.parent.glob("*.tmp"))


def test_newer_entries_take_the_place_of_older_ones() -> None:
    both = table(b8=FAST, b16=FAST).merged(table(b16=OTHER, b32=OTHER))
    assert {size: e.schedule for size, e in both.entries[key(SPEC)].items()} == {
        8: FAST,
        16: OTHER,
        32: OTHER,
    }


def test_the_best_of_rows() -> None:
    """One M stands for a bucket: a time at M = 1 says nothing about one at 8."""
    rows = [
        {"spec": str(SPEC), "m": 1, "schedule": FAST, "us": 5.0},
        {"spec": str(SPEC) + " bias", "m": 1, "schedule": OTHER, "us": 4.0},
        {"spec": str(SPEC), "m": 8, "schedule": FAST, "us": 3.0},
        {"spec": str(SPEC), "m": 20, "schedule": FAST, "us": 6.0},
        {"spec": str(SPEC), "m": 30, "schedule": OTHER, "us": 7.0},
        {"spec": str(SPEC), "m": 64, "schedule": OTHER, "failed": "why"},
    ]
    found = best_of("card", rows, "raw").entries[key(SPEC)]
    assert found == {8: Entry(OTHER, 4.0), 32: Entry(OTHER, 7.0)}


def test_shipped_tables_hold_today(home: Path) -> None:
    """Every entry is of a layout that kernels take today, and of a schedule that runs."""
    paths = sorted(SHIPPED.glob("*.json"))
    assert paths, "no table is shipped"
    for path in paths:
        found = Table.parse(path.read_text(encoding="utf-8"))
        card = device(found.card)
        assert shipped_file(card) == path == SHIPPED / f"{card.slug}.json"
        assert found.sources and found.entries
        for name, sizes in found.entries.items():
            for size, entry in sizes.items():
                # An entry of two weights serves any epilogue, without which there is no such kernel.
                text = f"{name} -> add(y0,y1)" if " 2*" in name else name
                told = lookup(GemmSpec.parse(text), size, card)
                assert told is not None and str(told) == entry.schedule and entry.us > 0


def test_a_card_of_the_same_kind_takes_the_table_of_another() -> None:
    """The H100 that is sold as a module has the H200's multiprocessors; the PCIe card has fewer."""
    assert shipped_file(device("NVIDIA H100 80GB HBM3")) == SHIPPED / "nvidia_h200.json"
    assert shipped_file(device("NVIDIA H100 PCIe")) is None
    assert shipped_file(device("NVIDIA A100-SXM4-80GB")) is None


class Properties:
    name, major, minor = "NVIDIA Unheard-of", 9, 0
    multi_processor_count, shared_memory_per_multiprocessor = 66, 228 * 1024
    clock_rate, memory_clock_rate, memory_bus_width = 1_755_000, 2_619_000, 5120


def test_an_unknown_card_is_what_its_driver_says() -> None:
    found = from_properties(Properties)
    assert (found.arch, found.multiprocessors, found.shared) == (90, 66, 228 * 1024)
    assert found.read == pytest.approx(0.93 * 3.35e12, rel=0.01)
    assert found.flops == pytest.approx(0.79 * 66 * 1.755e9 * 4096)
    assert choose(SPEC, 1) is not None and found.slug == "nvidia_unheard_of"


def test_a_table_says_what_is_wrong_with_it() -> None:
    with pytest.raises(CodegenError, match="it is of version 2, and this bitfold's is 1"):
        Table.parse('{"version": 2}')
    with pytest.raises(CodegenError, match="it holds no table"):
        Table.parse(json.dumps({"version": 1, "entries": 3}))


def test_schedules_of_a_table_parse() -> None:
    assert Schedule.parse(FAST).obstacle(SPEC) is None and Schedule.parse(OTHER).obstacle(SPEC) is None
