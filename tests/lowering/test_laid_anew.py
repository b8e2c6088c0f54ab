"""A model that was pickled where eight groups of a row lie side by side runs where kernels read none such.

Values are the same, so products differ by the order of their sums: by up to 1536 * 2**-24 * sum |x w|, which
is below 1536 * 2**-24 * 64 here.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import bitfold as bf
from bitfold.codegen import CodegenError, GemmSpec
from bitfold.codegen.cpp import build, support
from bitfold.codegen.cpp.vectors import VECTORS, widest
from bitfold.formats import format
from bitfold.formats.group_lanes import GroupLanes

BOTH = tuple(bf.Rule(op=op, weight="int4[g64]") for op in ("embedding", "head"))
WITHIN = {"rtol": 0.0, "atol": 1536 * 2**-24 * 64}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 512), nn.Linear(512, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.table(ids))
        return found


def pickled_with_lanes(model: nn.Module, *rules: bf.Rule) -> bytes:
    """What a processor with AVX2 would pickle. Nothing of it runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "widest", lambda: VECTORS["avx2"])
        patch.setattr(build, "know", lambda specs: list(specs))
        bf.quantize(model, bf.Recipe("r", rules), target="cpu")
    assert any(is_in_lanes(layer) for layer in model.modules())
    written = io.BytesIO()
    torch.save(model, written)
    return written.getvalue()


def is_in_lanes(layer: nn.Module) -> bool:
    weights = getattr(layer, "folded_weights", ())
    return any(isinstance(format(weight.format).layout, GroupLanes) for weight in weights)


def loaded(written: bytes) -> nn.Module:
    model: nn.Module = torch.load(io.BytesIO(written), weights_only=False)
    assert all(not is_in_lanes(layer) for layer in model.modules()) or widest().lanes
    return model.eval()


@pytest.mark.parametrize(
    "rule",
    [
        bf.Rule(weight="int4[g64]"),
        # Of groups that fill no vector of AVX-512, so that no kernel is left.
        bf.Rule(weight="int4[g24]"),
        bf.Rule(weight="int4[g64]", input="int8[tensor]"),
        bf.Rule(weight="int4[g64]", input="int8"),
    ],
    ids=str,
)
def test_linears_compute_the_same(rule: bf.Rule) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1536, 48), nn.Linear(1536, 48)).eval()
    expected = bf.quantize(copy.deepcopy(model), bf.Recipe("r", (rule,)), target="reference")
    found = loaded(pickled_with_lanes(model, rule))
    first, last = found[0], found[1]
    assert torch.equal(first.weight, expected[0].weight) and not torch.equal(first.weight, last.weight)
    assert first.body is last.body  # alike to the compiler
    x = torch.randn(3, 1536)
    for layer, other in ((first, expected[0]), (last, expected[1])):
        torch.testing.assert_close(layer(x), other(x), **WITHIN)
    again = pickle.loads(pickle.dumps(first))
    assert again.extra_repr() == first.extra_repr() and torch.equal(again(x), first(x))
    expected.load_state_dict(found.state_dict())
    torch.testing.assert_close(expected[0](x), first(x), **WITHIN)


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    expected = bf.quantize(copy.deepcopy(model), bf.Recipe("r", BOTH), target="reference")
    found = loaded(pickled_with_lanes(model, *BOTH))
    assert found.table.codes is found.head.codes
    ids = torch.tensor([[3, 5, 39]])
    torch.testing.assert_close(found(ids), expected(ids), **WITHIN)


def test_a_kernel_of_other_vectors_says_what_to_do() -> None:
    spec = GemmSpec.parse("linear 64x512 f32 int4[g64,lanes.planar64]")
    with pytest.raises(CodegenError, match=r"another processor; bf\.load a file .* again here$"):
        build.library_of(spec, VECTORS["avx512vnni"])
