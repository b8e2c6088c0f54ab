"""Formats of a third party: one registration, and every text, operator and pack knows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from itertools import count

import pytest
import torch

from bitfold.formats import (
    Codebook,
    Float,
    FormatError,
    Integer,
    Layout,
    Packed,
    describe,
    format,
    register,
    registry,
)
from bitfold.formats.mover import Field, k

ops = torch.ops.bitfold
_numbers = count()


@pytest.fixture
def name() -> Iterator[str]:
    """A new name for every test, gone afterwards; parsed texts stay cached, so no name is used twice."""
    name = f"registered_by_a_test_{next(_numbers)}"
    yield name
    registry._registered.pop(name, None)


def test_a_codebook_works_everywhere(name: str) -> None:
    with pytest.raises(FormatError, match="unknown format"):
        format(f"{name}[g32]")
    register(name, Codebook(name, (0.0, 0.1, 0.3, 1.0, -0.1, -0.3, -1.0)))
    f = format(f"{name}[g32,planar]")
    assert str(f) == f"{name}[g32,planar]" and f.element.bits == 3
    x = torch.randn(4, 64)
    codes, scales = ops.quantize(x, str(f))
    assert codes.shape == (4, 24)
    back = ops.dequantize([codes, scales], str(f), 64, torch.float32)
    assert torch.equal(back, f.fake_quantize(x))
    assert (back - x).norm() / x.norm() < 0.35  # seven values, far apart at the top
    assert name in {row.name for row in describe()}


def test_a_whole_format_is_an_alias_that_takes_items(name: str) -> None:
    register(name, format("int5[g48,f16,noclip]"))
    assert format(name) == format("int5[g48,f16,noclip]")
    assert str(format(name)) == name
    assert format(f"{name}[2:4,planar]") == format("int5[g48,f16,noclip,2:4,planar]")
    assert str(format(f"{name}[planar]")) == f"{name}[planar]"
    assert str(format(f"{name}[g96]")) == "int5[g96,f16,noclip]"


def test_a_layout_of_ones_own(name: str) -> None:
    @dataclass(frozen=True)
    class HighFirst(Packed):
        """Four bits, the even element in the high nibble, as some libraries have it."""

        name: str = ""

        def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
            return (Field(0, bits, k * bits // 8, 4 - 4 * (k % 2)),)

    register(name, HighFirst(name))
    f = format(f"int4[g32,{name}]")
    assert format(str(f)) == f and isinstance(f.layout, Layout)
    x = torch.randn(3, 64)
    q = f.quantize(x)
    swapped = format("int4[g32]").quantize(x).codes
    assert torch.equal(q.codes, (swapped >> 4) | (swapped << 4))
    assert torch.equal(q.dequantize(), f.fake_quantize(x))
    assert format("int8").with_layout("bytes").layout.name == "bytes"


def test_an_entry_point_is_found_when_its_name_is_first_used(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Codebook(name, (-1.0, 0.0, 1.0, 2.0))
    loads = []

    class Entry(EntryPoint):
        def load(self) -> Codebook:
            loads.append(self.name)
            return book

    def found(*, group: str, name: str) -> list[EntryPoint]:
        assert group == "bitfold.formats"
        return [Entry(name, "somewhere:thing", group)] if name == book.name else []

    monkeypatch.setattr(registry, "entry_points", found)
    assert format(f"{name}[g16]").element == book
    assert format(f"{name}[g32]").element == book
    assert loads == [name]


@pytest.mark.parametrize("taken", ["int4", "mxfp4", "nf4", "float8_e4m3fn", "planar", "row", "bf16", "floor"])
def test_a_taken_name_is_refused(taken: str) -> None:
    with pytest.raises(FormatError, match=f"the name '{taken}' is taken"):
        register(taken, Codebook(taken, (0.0, 1.0)))


def test_registering_twice_and_wrongly_is_refused(name: str) -> None:
    register(name, Codebook(name, (0.0, 1.0)))
    with pytest.raises(FormatError, match="is taken"):
        register(name, Codebook(name, (0.0, 2.0)))
    with pytest.raises(FormatError, match="letters, digits and underscores"):
        register("my format", Integer(4))
    with pytest.raises(FormatError, match="only an Element, a Layout or a Format"):
        register("thing", 4)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="under its own name"):
        register("another", Float(3, 2))


def test_compile_caches_tell_registered_tables_apart(name: str) -> None:
    before = torch.compiler.config.cache_key_tag
    register(name, Codebook(name, (0.0, 1.0)))
    first = torch.compiler.config.cache_key_tag
    registry._registered.pop(name)
    register(name, Codebook(name, (0.0, 2.0)))
    assert "bitfold:" in before and len({before, first, torch.compiler.config.cache_key_tag}) == 3
