"""Codes of the user's parameters for compiled graphs: folded once, shared, renewed when a parameter changes.

In: a parameter, what is quantized of it, a layout. Out: codes and scales, the same tensors each time.

    prefill graph, decode graph, recompiles:  (fc.weight, int4[g128]) in planar layout  ->  one `Quantized`
    fc.weight.mul_(2); compiled(x)            ->  the same tensors, now with the codes of the new values

The parameters are the user's: nothing here alters, frees or keeps one. Entries die with their parameter. A
change is known by the parameter's version and address; a write through `.data` leaves both, and is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ..formats import Layout, Quantized, format

Make = Callable[[Tensor], Quantized]
Stamp = tuple[int, int]


@dataclass(frozen=True)
class Folding:
    """What is quantized: an expression of a parameter ("" or views and casts as text), in a format."""

    expression: str
    format: str


def stamp(parameter: Tensor) -> Stamp:
    """Another one after a write in place, or in other memory. Inference tensors have no version."""
    version = -1 if parameter.is_inference() else parameter._version
    return version, parameter.data_ptr()


@dataclass
class _Kept:
    """Codes of one fold of one parameter, by the text of their format, which says the layout."""

    stamp: Stamp
    make: Make
    laid: dict[str, Quantized] = field(default_factory=dict)

    def refresh(self, parameter: Tensor) -> None:
        """Write the codes of the parameter as it is now into the tensors that graphs hold already."""
        now = stamp(parameter)
        if now == self.stamp:
            return
        with torch.inference_mode(False), torch.no_grad():
            canonical = self.make(parameter)
            for old in self.laid.values():
                new = canonical.format.relayout(canonical, old.format.layout)
                for part, value in zip(old.parts, new.parts, strict=True):
                    part.copy_(value)
        self.stamp = now


class WeightStore:
    """Folded weights of all compiled graphs of a process, by parameter."""

    def __init__(self) -> None:
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def find(self, parameter: Tensor, fold: Folding) -> list[Quantized]:
        """The codes kept for this fold, in every layout that some graph has them in; up to date."""
        kept = self._folds(parameter).get(fold)
        if kept is None:
            return []
        kept.refresh(parameter)
        return list(kept.laid.values())

    def keep(self, parameter: Tensor, fold: Folding, codes: Quantized, make: Make) -> Quantized:
        """The codes to use in a graph: these, or those kept before in the same layout."""
        folds = self._folds(parameter)
        if fold not in folds:
            folds[fold] = _Kept(stamp(parameter), make)
        return folds[fold].laid.setdefault(str(codes.format), codes)

    def get(self, parameter: Tensor, fold: Folding, layout: Layout, make: Make) -> Quantized:
        """The codes of this fold in this layout, made if they are not kept."""
        found = {str(codes.format): codes for codes in self.find(parameter, fold)}
        with torch.inference_mode(False), torch.no_grad():
            source = next(iter(found.values())) if found else make(parameter)
            wanted = str(source.format.with_layout(layout))
            codes = found.get(wanted) or source.format.relayout(source, layout)
        return self.keep(parameter, fold, codes, make)

    def _folds(self, parameter: Tensor) -> dict[Folding, _Kept]:
        if parameter not in self._kept:
            self._kept[parameter] = {}
        return cast(dict[Folding, _Kept], self._kept[parameter])


@dataclass
class Use:
    """A folded weight in one graph: which parameter it came from, and its codes as the graph has them now."""

    parameter: Tensor
    fold: Folding
    make: Make
    codes: Quantized


class GraphWeights:
    """The store as passes see it (`State.store`), for one graph: `fold` gets codes, `lower` lays them out."""

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self.uses: list[Use] = []

    def folded(self, parameter: Tensor, expression: str, format: str, make: Make) -> Quantized:
        """Canonical codes of this fold: from the store if it has them in any layout, else made."""
        fold = Folding(expression, format)
        with torch.inference_mode(False), torch.no_grad():
            known = self.store.find(parameter, fold)
            codes = _canonical(known[0], format) if known else make(parameter)
        self.uses.append(Use(parameter, fold, make, codes))
        return codes

    def relaid(self, codes: Quantized, layout: Layout) -> Quantized:
        """`codes` in another layout: the ones in the store, if some graph has them so."""
        use = next((one for one in self.uses if one.codes.codes is codes.codes), None)
        with torch.inference_mode(False), torch.no_grad():
            if use is None:
                return codes.format.relayout(codes, layout)
            known = self.store.find(use.parameter, use.fold)
            same = next((one for one in known if one.format.layout == layout), None)
            laid = same or codes.format.relayout(codes, layout)
        use.codes = self.store.keep(use.parameter, use.fold, laid, use.make)
        return use.codes

    def settle(self) -> dict[int, tuple[Use, int]]:
        """Keep what the graph ended up with. Returns, by identity, which part of which use each tensor is."""
        found = {}
        for use in self.uses:
            given = use.codes.parts
            use.codes = self.store.keep(use.parameter, use.fold, use.codes, use.make)
            for index, tensor in enumerate(given):
                found[id(tensor)] = (use, index)
        return found


def _canonical(codes: Quantized, text: str) -> Quantized:
    return codes.format.relayout(codes, format(text).layout)


class Slot:
    """One folded weight of a compiled graph: in each call, the codes of the parameter that it is given.

    One graph may be called with the parameters of several modules (blocks compiled one by one share a graph).
    """

    def __init__(self, index: int, use: Use, store: WeightStore) -> None:
        self.index = index
        self.fold, self.make, self.layout = use.fold, use.make, use.codes.format.layout
        self.store = store
        self._remember(use.parameter, use.codes)

    def _remember(self, parameter: Tensor, codes: Quantized) -> None:
        self._parameter = TensorWeakRef(parameter)
        self._stamp = stamp(parameter)
        self._parts = codes.parts

    def parts(self, given: Tensor) -> list[Tensor]:
        """Codes and scales of `given`, the argument at `index`; a comparison when nothing has changed."""
        if self._parameter() is not given or self._stamp != stamp(given):
            self._remember(given, self.store.get(given, self.fold, self.layout, self.make))
        return self._parts
