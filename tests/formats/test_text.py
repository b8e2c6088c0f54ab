"""The text form: parses, prints, comes back the same; and says what is wrong with a wrong one."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch

from bitfold.formats import FormatError, describe, format
from bitfold.formats.catalog import ELEMENTS, FORMATS
from bitfold.formats.rules import RULES

NAMES = [
    "int8",
    "int4",
    "uint3",
    "uint8",
    "int1",
    "float8_e4m3fn",
    "float6_e2m3",
    "float5_e2m2",
    "nf4",
    "ternary",
]
NAMES += ["mxfp4", "mxint8", "nvfp4", "q4_0", "q4_1", "tinygemm", "int8f6"]
GRANULARITIES = ["", "tensor", "row", "g32", "g48", "16x32"]
DTYPES = ["", "f32", "bf16", "f16", "e8m0", "e4m3"]
ZEROS = ["", "zero", "zero:float", "zero:min"]
RULE = ["", *RULES]
FLAGS = ["", "native", "two_level", "one_level", "unscaled"]
SPARSE = ["", "2:4", "1:4"]
LAYOUT = ["", "bytes", "packed", "planar", "planar64"]
AXES = [NAMES, GRANULARITIES, DTYPES, ZEROS, RULE, FLAGS, SPARSE, LAYOUT]


def pairwise_cover(axes: list[list[str]]) -> list[tuple[str, ...]]:
    """Rows in which every pair of values of two axes occurs (greedy: the pair wanted most often first)."""
    missing = {
        (i, a, j, b) for (i, x), (j, y) in itertools.combinations(enumerate(axes), 2) for a in x for b in y
    }
    rows = []
    while missing:
        i, a, j, b = min(missing)
        row: list[str | None] = [None] * len(axes)
        row[i], row[j] = a, b
        for n, axis in enumerate(axes):
            if row[n] is None:
                row[n] = max(
                    axis,
                    key=lambda v: sum(
                        _pair(n, v, m, w) in missing for m, w in enumerate(row) if w is not None
                    ),
                )
        missing -= {_pair(n, v, m, w) for (n, v), (m, w) in itertools.combinations(enumerate(row), 2)}
        rows.append(tuple(v or "" for v in row))
    return rows


def _pair(i: int, a: str | None, j: int, b: str | None) -> tuple[int, str | None, int, str | None]:
    return (i, a, j, b) if i < j else (j, b, i, a)


def texts() -> list[str]:
    """Covered pairwise, and each item alone, so that valid formats are many."""
    rows = pairwise_cover(AXES)
    alone = [
        (n, *(v if i == axis else "" for i in range(1, 8)))
        for n in NAMES
        for axis in range(1, 8)
        for v in AXES[axis]
    ]
    grouped = [(n, g, *rest[2:]) for n, g, rest in itertools.product(NAMES, ["g32"], alone[:40])]
    found = []
    for name, *items in [*rows, *alone, *grouped]:
        inside = ",".join(i for i in items if i)
        found.append(f"{name}[{inside}]" if inside else name)
    return list(dict.fromkeys(found))


def test_what_prints_parses_to_the_same_format() -> None:
    valid = 0
    for text in texts():
        try:
            f = format(text)
        except FormatError as error:
            assert str(error) and "\n" not in str(error)
            continue
        valid += 1
        assert format(str(f)) == f, text
        assert str(format(str(f))) == str(f), text
        assert hash(f) == hash(format(str(f)))
    assert valid > 300


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("int8", "int8"),
        ("int8[row,f32]", "int8"),
        ("int4[g128]", "int4[g128]"),
        ("int4[ g128 , bf16 ]", "int4[g128]"),
        ("int4[planar,g128]", "int4[g128,planar]"),
        ("int4[g128,f32]", "int4[g128,f32]"),
        ("uint4[g32,f16,zero:min]", "q4_1"),
        ("float4_e2m1[g32,e8m0]", "mxfp4"),
        ("float4_e2m1fn[g32,e8m0,rceil,planar]", "mxfp4[rceil,planar]"),
        ("mxfp4[g16]", "float4_e2m1[g16,e8m0]"),
        ("mxfp4[bf16]", "float4_e2m1[g32]"),
        ("float4_e2m1[g16,e4m3]", "nvfp4[one_level]"),
        ("nvfp4[two_level]", "nvfp4"),
        ("ternary[absmean]", "ternary"),
        ("ternary[absmax]", "ternary[absmax]"),
        ("int8[packed]", "int8"),
        ("int8[planar]", "int8"),
        ("int4[zero]", "int4[zero]"),
        ("int8[g32,2:4]", "int8[g32,2:4]"),
        ("float8_e5m2[unscaled]", "float8_e5m2[unscaled]"),
        ("q8_0[2:4]", "q8_0[2:4]"),
        ("int4[native,g64,noclip]", "int4[g64,noclip,native]"),
        ("float6_e3m2fn", "float6_e3m2"),
        ("uint4[g64,zero:none]", "uint4[g64]"),
    ],
)
def test_canonical_form(text: str, printed: str) -> None:
    assert str(format(text)) == printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int44", "unknown format 'int44'; did you mean 'int4'"),
        ("mxfp5", "did you mean 'mxfp"),
        ("NVFP4", "did you mean 'nvfp4'"),
        ("completely", "unknown format 'completely'; `bitfold formats` lists them"),
        ("int4[", "is not a format"),
        ("", "is not a format"),
        ("int4[g128", "is not a format"),
        ("int4[group]", "item 'group' that is none of a format's items"),
        ("int4[plannar]", "did you mean 'planar'"),
        ("int4[g0]", "item 'g0'"),
        ("int4[g32,]", "item ''"),
        ("int4[g32,g64]", "says twice what its granularity is"),
        ("int4[g32,f16,bf16]", "says twice what its dtype is"),
        ("int4[floor]", "rule 'floor' needs e8m0 scales, not f32"),
        ("int4[g32,e8m0,noclip]", "e8m0 scales take one of the rules floor, ceil, even, rceil"),
        ("int4[e8m0,zero]", "e8m0 scales have no zero point"),
        ("int4[zero:min]", "use uint4 instead of int4"),
        ("nf4[zero]", "zero points are for integers; nf4 is symmetric"),
        ("uint4[zero,noclip]", "is for signed integers without a zero point"),
        ("float8_e4m3fn[noclip]", "is for signed integers"),
        ("nf4[e8m0,even]", "codebook nf4 lacks"),
        ("mxfp4[native]", "native arithmetic"),
        ("int8[two_level]", "two levels are for e4m3 scales"),
        ("int4[g6,2:4]", "with 2:4 sparsity a group is a multiple of 4, not 6"),
        ("int4[3:3]", "n:m sparsity keeps"),
        ("int4[unscaled,g32]", "an unscaled format has no granularity"),
        ("int4[1x32]", None),
        ("int4[planar0]", "1 or more codes, not 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text: str, message: str | None) -> None:
    if message is None:
        assert str(format(text)) == "int4[g32]"
        return
    with pytest.raises(FormatError) as caught:
        format(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_text_is_a_format() -> None:
    with pytest.raises(FormatError, match="not as int"):
        format(4)  # type: ignore[arg-type]
    assert format(format("int4")) == format("int4")


def test_every_name_in_the_catalog_prints_as_itself() -> None:
    for name in [*ELEMENTS, *FORMATS]:
        assert str(format(name)) == name


def test_formats_pickle_and_copy() -> None:
    for name in ["int4[g128,planar]", "nvfp4", "ternary", "int8[2:4]"]:
        assert pickle.loads(pickle.dumps(format(name))) == format(name)


def test_bits_per_element_is_what_is_stored() -> None:
    for text in [
        "int8",
        "int4[g128]",
        "nvfp4",
        "q4_1",
        "uint4[g32,zero]",
        "int3[g32,planar]",
        "int5",
        "mxfp6_e2m3",
    ]:
        for extra in ("", "2:4"):
            f = format(text)
            f = format(
                f"{text[:-1]},{extra}]" if extra and "[" in text else f"{text}[{extra}]" if extra else text
            )
            x = torch.randn(6, 128)
            assert f.bits_per_element(x.shape) == f.quantize(x).nbytes * 8 / x.numel(), str(f)
            big = (4096, 1 << 14)
            assert f.bits_per_element() == pytest.approx(f.bits_per_element(big), rel=1e-3), str(f)


def test_the_table_has_a_row_for_every_name() -> None:
    rows = {row.name: row for row in describe()}
    assert set(FORMATS) | set(ELEMENTS) <= set(rows)
    assert rows["mxfp4"].bits == 4.25
    assert rows["mxfp4"].stands_for == "float4_e2m1[g32,e8m0]"
    assert rows["int8"].range == "-128 .. 127"
    assert rows["q4_1"].source == "GGUF"
    assert all(row.rule and row.source and row.stands_for for row in rows.values())
    assert [row.name for row in describe(["int4[g64]"])] == ["int4[g64]"]
