"""Patterns: found where they are, refused with a reason where they cannot be."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.formats.errors import BitfoldError
from bitfold.passes import Match, Miss, Pattern, capture, rewrite, snapshot, state, verify

SILU = Pattern("silu", lambda x: x * torch.sigmoid(x), F.silu, (torch.empty(2, 3),))
RMS_NORM = Pattern(
    "rms_norm",
    lambda x, w, eps: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * w,
    lambda x, w, eps: F.rms_norm(x, [4], w, eps),
    (torch.empty(2, 4), torch.empty(4), 0.123),
)


class Calls(nn.Module):
    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.w = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w)


def rewritten(call: Callable[[Tensor, Tensor], Tensor], *patterns: Pattern) -> tuple[int, str, list[str]]:
    """How many rewrites, the graph after, the misses; having checked that it computes the same."""
    x, model = torch.randn(2, 4), Calls(call)
    gm = capture(model, x)
    rewrites = rewrite(gm, patterns)
    gm.recompile()
    verify(gm, state(gm).stage)
    torch.testing.assert_close(gm(x), model(x))
    shown = [str(node) for node in snapshot(gm) if node.op not in ("placeholder", "get_attr")]
    return rewrites, "\n".join(shown), [miss.reason for miss in state(gm).misses]


def test_a_match_is_replaced() -> None:
    expected = (
        "silu: f32[2, 4] = aten.silu.default(x)\nadd: f32[2, 4] = aten.add.Tensor(silu, 1)\nreturn (add,)"
    )
    assert rewritten(lambda x, w: x * torch.sigmoid(x) + 1, SILU) == (1, expected, [])


def test_factors_match_in_either_order() -> None:
    assert rewritten(lambda x, w: torch.sigmoid(x) * x, SILU)[0] == 1


def test_one_input_is_one_value() -> None:
    assert rewritten(lambda x, w: (x + 1) * torch.sigmoid(x), SILU)[0] == 0


def test_matches_in_a_chain_are_all_replaced() -> None:
    def chain(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            x = x * torch.sigmoid(x)
        return x

    rewrites, shown, _ = rewritten(chain, SILU)
    assert rewrites == 3
    assert shown.count("silu.default") == 3 and "sigmoid" not in shown


def test_numbers_are_bound_and_passed_on() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return w * (torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * x)

    rewrites, shown, _ = rewritten(norm, RMS_NORM)
    assert rewrites == 1
    assert shown == "rms_norm: f32[2, 4] = aten.rms_norm.default(x, [4], w, 1e-05)\nreturn (rms_norm,)"


def test_other_numbers_have_to_be_equal() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(0, keepdim=True) + 1e-5) * w

    assert rewritten(norm, RMS_NORM)[0] == 0


def test_an_intermediate_result_used_elsewhere_is_a_miss() -> None:
    def both(x: Tensor, w: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return x * s + s

    rewrites, _, misses = rewritten(both, SILU)
    assert rewrites == 0
    assert misses == ["its intermediate result 'sigmoid' is used by 'add', too"]


def test_where_may_refuse_and_says_why() -> None:
    def even(match: Match) -> Miss | None:
        size = match.root.meta["val"].shape[-1]
        return None if size % 3 == 0 else Miss(f"the width is {size}, and 3 does not divide it")

    picky = Pattern("picky", SILU.pattern, SILU.replacement, SILU.examples, where=even)
    rewrites, _, misses = rewritten(lambda x, w: x * torch.sigmoid(x), picky)
    assert rewrites == 0
    assert misses == ["the width is 4, and 3 does not divide it"]


def test_the_first_pattern_comes_first() -> None:
    gelu = Pattern("gelu", SILU.pattern, F.silu, SILU.examples)
    assert rewritten(lambda x, w: x * torch.sigmoid(x), gelu, SILU)[0] == 1


def test_new_nodes_say_where_they_come_from() -> None:
    gm = capture(Calls(lambda x, w: x * torch.sigmoid(x)), torch.randn(2, 4))
    rewrite(gm, [SILU])
    silu = next(node for node in snapshot(gm) if node.name == "silu")
    assert silu.made_from == ("sigmoid", "mul")
    assert silu.source.startswith("test_pattern.py:")


@pytest.mark.parametrize(
    ("function", "examples", "says"),
    [(lambda x: x, (torch.empty(2),), "has to compute"), (lambda a: a, (1.0,), "needs a tensor")],
)
def test_a_pattern_computes_something(function: Callable[..., Tensor], examples: tuple, says: str) -> None:
    with pytest.raises(BitfoldError, match=says):
        Pattern("nothing", function, function, examples)
