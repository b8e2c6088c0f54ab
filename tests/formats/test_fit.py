"""Scales that are fitted, and columns rounded one by one: for every kind of format, from its own
statement."""

from __future__ import annotations

import pytest
import torch

import bitfold as bf
from bitfold.formats.fit import Columns, multipliers, shrunk, spacing, with_multipliers
from bitfold.formats.rules import RULES

FORMATS = [
    "int4[g32]",
    "int4[row]",
    "int4[tensor]",
    "int8[16x32]",
    "int3[g32,f16,noclip]",
    "q4_0",
    "q4_1",
    "uint4[g64,bf16,zero:int]",
    "tinygemm",
    "nf4[g64]",
    "ternary",
    "mxfp4",
    "mxfp4[rceil]",
    "nvfp4",
    "float8_e4m3fn[row]",
    "int2[g32]",
]


def weight(rows: int = 16, k: int = 128, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(rows, k) * torch.logspace(-1, 1, rows)[:, None]


@pytest.mark.parametrize("text", FORMATS)
def test_columns_are_those_of_the_whole(text: str) -> None:
    """Bit for bit: no format has a rounding of its own here."""
    f, w = bf.format(text), weight(32)
    params = f.choose(w)
    columns = Columns(f, params, w.shape[0])
    whole = f.fake_quantize(w, params)
    parts = [columns.round(w[:, j : j + 1], j) for j in range(w.shape[1])]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("text", FORMATS)
def test_values_of_the_format_round_to_themselves(text: str) -> None:
    """So an algorithm may hand over values, and the codes that it meant come out."""
    f, w = bf.format(text), weight()
    params = f.choose(w)
    values = f.fake_quantize(w, params)
    assert torch.equal(f.fake_quantize(values, params), values)


@pytest.mark.parametrize(
    "text", [text for text in FORMATS if "zero" not in text and text not in ("q4_1", "tinygemm")]
)
def test_multipliers_there_and_back(text: str) -> None:
    f, w = bf.format(text), weight()
    params = f.choose(w)
    again = with_multipliers(f, params, multipliers(f, params))
    for one, other in zip(params, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("text", FORMATS)
def test_spacing_is_what_a_number_moves_by(text: str) -> None:
    """Well inside the range, a number is at most half a spacing from its value, and a spacing more is another
    one."""
    f, w = bf.format(text), weight() * 0.4
    params = f.choose(w * 2)
    gap = spacing(f, params, w)
    assert (gap > 0).all()
    values = f.fake_quantize(w, params)
    assert ((values - w).abs() <= gap * 0.5 * (1 + 1e-5)).float().mean() > 0.98
    assert (f.fake_quantize(w + 1.001 * gap, params) > values).float().mean() > 0.75


def test_a_shrunk_scale_is_that_share() -> None:
    f, w = bf.format("int4[g32,f32]"), weight()
    first = f.choose(w)
    assert torch.allclose(multipliers(f, shrunk(f, w, 0.5, first)), multipliers(f, first) * 0.5)


def test_a_shrunk_block_keeps_its_tensor_scale() -> None:
    f, w = bf.format("nvfp4"), weight()
    first = f.choose(w)
    small = shrunk(f, w, 0.5, first)
    assert torch.equal(small[1], first[1])
    # e4m3 has 3 mantissa bits; blocks at the bottom of its range have none.
    large = first[0].float() >= 1.0
    ratio = (multipliers(f, small) / multipliers(f, first))[large]
    assert ((ratio - 0.5).abs() <= 0.5 / 16).all()


def test_powers_of_two_go_to_the_nearest() -> None:
    f, w = bf.format("mxfp4"), weight()
    first = f.choose(w)
    up = with_multipliers(f, first, multipliers(f, first) * 1.5)
    assert torch.equal(up[0].int(), first[0].int() + 1)


def test_sparse_formats_are_refused() -> None:
    f = bf.format("int8[row,2:4]")
    with pytest.raises(bf.FormatError, match="stores some of the columns"):
        Columns(f, f.choose(weight()), 16)


def test_every_rule_shrinks() -> None:
    """The claim at the top of fit.py: half the data, about half the scale, whatever rule chose it."""
    w = weight()
    for name, rule in RULES.items():
        text = {"absmean": "ternary", "hqq": "uint4[g64,bf16,zero:float,hqq]"}.get(
            name, f"{'mxfp4' if rule.power else 'int4[g32]'}".replace("]", f",{name}]")
        )
        if rule.power:
            text = f"mxfp4[{name}]"
        f = bf.format(text)
        first = f.choose(w)
        ratio = f.scale.decode(shrunk(f, w, 0.5, first)[0]) / f.scale.decode(first[0])  # type: ignore[union-attr]
        # bfloat16 scales have 8 bits; `hqq` moves the zero point, not the scale.
        assert ((ratio - 0.5).abs() < 0.5 / 64).all(), name
