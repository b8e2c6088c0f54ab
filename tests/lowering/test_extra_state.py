"""What a module keeps by `get_extra_state` goes through `bf.save` and `bf.load`, and through state dicts."""

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf


class Counting(nn.Module):
    """A weight of its own, so that it may be folded, and a state that is no parameter."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.w, self.kept = nn.Parameter(torch.randn(32, 32)), kept

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


STATE = {
    "steps": 3,
    "name": "a",
    "mean": torch.arange(5.0),
    "nested": [(1, None, torch.ones((), dtype=torch.int8)), {"limit": float("inf"), 7: True}],
    "none": OrderedDict(),
}


def same(one: Any, other: Any) -> bool:
    return str(one).replace("OrderedDict()", "{}") == str(other).replace("OrderedDict()", "{}")


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("state", [STATE, None, torch.arange(3), 5])
def test_a_state_is_in_the_file(state: Any, folded: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 32)
    model = nn.Sequential(nn.Linear(32, 32), Counting(state))
    model[0].aside = nn.Module()  # of no class of its own
    bf.quantize(model, "int8", example_inputs=(x,) if folded else None, target="reference")
    assert isinstance(model[1], bf.lowering.Folded) == folded
    bf.save(model, tmp_path / "m.safetensors")
    fresh = nn.Sequential(nn.Linear(32, 32), Counting("other"))
    for skeleton in (fresh, copy.deepcopy(model)):
        loaded = bf.load(tmp_path / "m.safetensors", into=skeleton, target="reference")
        assert same(loaded[1].kept, state) and torch.equal(loaded(x), model(x))
    bf.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_a_state_dict_of_a_folded_module_has_both_states() -> None:
    x = torch.randn(2, 32)
    model, other = (
        bf.quantize(Counting(k), "int8", example_inputs=(x,), target=t)
        for k, t in ((STATE, "cpu"), (None, "reference"))
    )
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert same(other.kept, STATE)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize(("state", "what"), [({"a": object()}, "object"), ([{1, 2}], "set"), (b"x", "bytes")])
def test_a_state_that_no_file_holds(state: Any, what: str, tmp_path: Path) -> None:
    model = bf.quantize(nn.Sequential(nn.Linear(32, 32), Counting(state)), "int8", target="reference")
    with pytest.raises(
        bf.BitfoldError,
        match=rf"extra state of 1 \(Counting.get_extra_state\) cannot be saved: it has a {what}",
    ):
        bf.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_state_on_one_side_only(tmp_path: Path) -> None:
    class Plain(Counting):
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

    for there, here, said in (
        (Counting, Plain, r"in .*safetensors and none in this"),
        (Plain, Counting, r"in this"),
    ):
        bf.save(bf.quantize(nn.Sequential(nn.Linear(32, 32), there()), "int8"), tmp_path / "m.safetensors")
        skeleton = nn.Sequential(nn.Linear(32, 32), here())
        with pytest.raises(bf.BitfoldError, match=rf"1 has an extra state \(get_extra_state\) {said}"):
            bf.load(tmp_path / "m.safetensors", into=skeleton)
        assert type(skeleton[0]) is nn.Linear
