"""The store of codes: one copy a layout, made anew in place, gone with the parameter."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor, nn

from bitfold.formats import Quantized, format, layout_named
from bitfold.lowering.weight_store import Folding, GraphWeights, Slot, WeightStore, stamp

FORMAT = format("int4[g32]")
FOLD = Folding("", "int4[g32]")
PLANAR = layout_named("planar")


class Counting:
    """Folds, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, parameter: Tensor) -> Quantized:
        self.calls += 1
        return FORMAT.quantize(parameter.detach())


def test_a_layout_is_made_once_and_the_canonical_codes_are_not_kept() -> None:
    store, make, parameter = WeightStore(), Counting(), nn.Parameter(torch.randn(8, 64))
    first = GraphWeights(store)
    canonical = first.folded(parameter, "", "int4[g32]", make)
    planar = first.relaid(canonical, PLANAR)
    first.settle()
    old = weakref.ref(canonical.codes)
    del canonical
    gc.collect()
    assert old() is None

    second = GraphWeights(store)
    again = second.folded(parameter, "", "int4[g32]", make)
    assert torch.equal(again.codes, FORMAT.quantize(parameter.detach()).codes)
    assert second.relaid(again, PLANAR).codes is planar.codes
    assert make.calls == 1
    assert [str(codes.format) for codes in store.find(parameter, FOLD)] == ["int4[g32,planar]"]


def test_every_layout_is_refreshed_in_place() -> None:
    store, make, parameter = WeightStore(), Counting(), nn.Parameter(torch.randn(8, 64))
    packed = store.get(parameter, FOLD, FORMAT.layout, make)
    planar = store.get(parameter, FOLD, PLANAR, make)
    with torch.no_grad():
        parameter.neg_()
    expected = FORMAT.quantize(parameter.detach()).dequantize()
    assert store.get(parameter, FOLD, PLANAR, make) is planar
    assert torch.equal(packed.dequantize(), expected)
    assert torch.equal(planar.dequantize(), expected)


def test_codes_made_in_inference_mode_are_ordinary_tensors() -> None:
    store, make, parameter = WeightStore(), Counting(), nn.Parameter(torch.randn(8, 64))
    with torch.inference_mode():
        codes = store.get(parameter, FOLD, PLANAR, make)
    assert not any(part.is_inference() for part in codes.parts)
    with torch.no_grad():
        parameter.mul_(2)
    assert store.get(parameter, FOLD, PLANAR, make) is codes


def test_expressions_and_formats_are_kept_apart() -> None:
    store, make, parameter = WeightStore(), Counting(), nn.Parameter(torch.randn(64, 64))
    plain = store.get(parameter, FOLD, PLANAR, make)
    turned = store.get(
        parameter, Folding("t()", "int4[g32]"), PLANAR, lambda given: FORMAT.quantize(given.detach().t())
    )
    other = store.get(
        parameter,
        Folding("", "int8"),
        layout_named("bytes"),
        lambda given: format("int8").quantize(given.detach()),
    )
    assert not torch.equal(plain.codes, turned.codes)
    assert str(other.format) == "int8"


def test_a_slot_compares_and_folds_only_what_is_new() -> None:
    store, make = WeightStore(), Counting()
    one, two = (nn.Parameter(torch.randn(8, 64)) for _ in range(2))
    weights = GraphWeights(store)
    weights.relaid(weights.folded(one, "", "int4[g32]", make), PLANAR)
    weights.settle()
    slot = Slot(0, weights.uses[0], store)
    for given in (one, two, one, two, two):
        found = Quantized.from_parts(FORMAT.with_layout(PLANAR), slot.parts(given), 64).dequantize()
        assert torch.equal(found, FORMAT.quantize(given.detach()).dequantize())
    assert make.calls == 2
    assert slot.parts(two) is slot.parts(two)


def test_entries_die_with_their_parameter() -> None:
    store, make, parameter = WeightStore(), Counting(), nn.Parameter(torch.randn(8, 64))
    codes = weakref.ref(store.get(parameter, FOLD, PLANAR, make).codes)
    del parameter
    gc.collect()
    assert codes() is None


def test_the_stamp_sees_writes_and_exchanges() -> None:
    parameter = nn.Parameter(torch.randn(4))
    stamps = [stamp(parameter)]
    with torch.no_grad():
        parameter.add_(1)
    stamps.append(stamp(parameter))
    kept = parameter.data
    parameter.data = torch.randn(4)
    stamps.append(stamp(parameter))
    assert len(set(stamps)) == 3
    del kept
    with torch.inference_mode():
        made = torch.randn(4)
    assert stamp(made) == (-1, made.data_ptr())
