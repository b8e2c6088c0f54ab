"""Normalize: every dress of a linear layer, as whole-graph snapshots, and equal in value."""

import textwrap
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.passes import capture, expression, snapshot, state
from bitfold.passes.normalize import Normalize

aten = torch.ops.aten


class Layer(nn.Module):
    """`call(x, self)` with weights [N, K] = [6, 4] and [K, N], a bias, and a batch of weights."""

    def __init__(self, call: Callable[[Tensor, "Layer"], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call = call
        self.w = nn.Parameter(torch.randn(6, 4))
        self.v = nn.Parameter(torch.randn(4, 6))
        self.b = nn.Parameter(torch.randn(6))
        self.batch = nn.Parameter(torch.randn(3, 4, 6))
        self.heads = nn.Parameter(torch.randn(4, 2, 3))
        self.vector = nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self)


def body(call: Callable[[Tensor, Layer], Tensor], x: Tensor, dynamic: str | None = "batch") -> str:
    """The captured graph of `call` without its inputs, after checking that it computes the same."""
    layer = Layer(call)
    gm = capture(layer, x, dynamic=dynamic)
    torch.testing.assert_close(gm(x), layer(x), rtol=1e-5, atol=1e-5)
    shown = [str(node) for node in snapshot(gm) if node.op not in ("get_attr", "placeholder")]
    return "\n".join(shown).replace("f32[s77, ", "f32[s, ")


LINEAR = "linear: f32[s, 6] = aten.linear.default(x, w)\nreturn (linear,)"
TRANSPOSED = (
    "t: f32[6, 4] = aten.t.default(v)\nlinear: f32[s, 6] = aten.linear.default(x, t)\nreturn (linear,)"
)

DRESSES: dict[str, tuple[Callable[[Tensor, Layer], Tensor], str]] = {
    "F.linear": (lambda x, m: F.linear(x, m.w), LINEAR),
    "x @ w.t()": (lambda x, m: x @ m.w.t(), LINEAR),
    "x @ w.T": (lambda x, m: x @ m.w.T, LINEAR),
    "x @ w.mT": (lambda x, m: x @ m.w.mT, LINEAR),
    "x @ w.transpose": (lambda x, m: x @ m.w.transpose(-1, 0), LINEAR),
    "x @ w.permute": (lambda x, m: x @ m.w.permute(1, 0), LINEAR),
    "mm": (lambda x, m: torch.mm(x, m.w.t()), LINEAR),
    "einsum kj": (lambda x, m: torch.einsum("bj,kj->bk", x, m.w), LINEAR),
    "einsum without arrow": (lambda x, m: torch.einsum("bj,kj", x, m.w), LINEAR),
    "einsum weight first": (lambda x, m: torch.einsum("kj,bj->bk", m.w, x), LINEAR),
    "einsum ellipsis": (lambda x, m: torch.einsum("...j,kj->...k", x, m.w), LINEAR),
    "x @ v": (lambda x, m: x @ m.v, TRANSPOSED),
    "matmul": (lambda x, m: torch.matmul(x, m.v), TRANSPOSED),
    "einsum jk": (lambda x, m: torch.einsum("bj,jk->bk", x, m.v), TRANSPOSED),
    "addmm": (
        lambda x, m: torch.addmm(m.b, x, m.w.t()),
        "linear: f32[s, 6] = aten.linear.default(x, w, b)\nreturn (linear,)",
    ),
    "addmm scaled": (
        lambda x, m: torch.addmm(m.b, x, m.w.t(), beta=0.5, alpha=2),
        "linear: f32[s, 6] = aten.linear.default(x, w)\nmul: f32[s, 6] = aten.mul.Tensor(linear, 2)\n"
        "mul_1: f32[6] = aten.mul.Tensor(b, 0.5)\n"
        "add: f32[s, 6] = aten.add.Tensor(mul, mul_1)\nreturn (add,)",
    ),
    "addmm without bias": (
        lambda x, m: torch.addmm(m.b, x, m.w.t(), beta=0),
        "linear: f32[s, 6] = aten.linear.default(x, w)\nreturn (linear,)",
    ),
    "w @ x": (
        lambda x, m: m.w @ x.t(),
        "t: f32[4, s77] = aten.t.default(x)\ntranspose: f32[s, 4] = aten.transpose.int(t, -2, -1)\n"
        "linear: f32[s, 6] = aten.linear.default(transpose, w)\n"
        "transpose_1: f32[6, s77] = aten.transpose.int(linear, -2, -1)\nreturn (transpose_1,)",
    ),
    "inner": (lambda x, m: torch.inner(x, m.w), LINEAR),
    "inner, weight first": (
        lambda x, m: torch.inner(m.w, x),
        "linear: f32[s, 6] = aten.linear.default(x, w)\n"
        "permute: f32[6, s77] = aten.permute.default(linear, [1, 0])\nreturn (permute,)",
    ),
    "tensordot": (lambda x, m: torch.tensordot(x, m.v, dims=1), TRANSPOSED),
    "tensordot over two": (
        lambda x, m: torch.tensordot(x.unflatten(-1, (2, 2)), m.w.unflatten(-1, (2, 2)), ([1, 2], [1, 2])),
        "unflatten: f32[s, 2, 2] = aten.unflatten.int(x, -1, [2, 2])\n"
        "unflatten_1: f32[6, 2, 2] = aten.unflatten.int(w, -1, [2, 2])\n"
        "flatten: f32[s, 4] = aten.flatten.using_ints(unflatten, 1, -1)\n"
        "flatten_1: f32[6, 4] = aten.flatten.using_ints(unflatten_1, 1, -1)\n"
        "linear: f32[s, 6] = aten.linear.default(flatten, flatten_1)\nreturn (linear,)",
    ),
    "einsum to heads": (
        lambda x, m: torch.einsum("bj,jhd->bhd", x, m.heads),
        "permute: f32[2, 3, 4] = aten.permute.default(heads, [1, 2, 0])\n"
        "flatten: f32[6, 4] = aten.flatten.using_ints(permute, 0, 1)\n"
        "linear: f32[s, 6] = aten.linear.default(x, flatten)\n"
        "unflatten: f32[s, 2, 3] = aten.unflatten.int(linear, -1, [2, 3])\nreturn (unflatten,)",
    ),
    "einsum from heads": (
        lambda x, m: torch.einsum("bhd,jhd->jb", x.unflatten(-1, (2, 2)), m.w.unflatten(-1, (2, 2))),
        "unflatten: f32[s, 2, 2] = aten.unflatten.int(x, -1, [2, 2])\n"
        "unflatten_1: f32[6, 2, 2] = aten.unflatten.int(w, -1, [2, 2])\n"
        "flatten: f32[s, 4] = aten.flatten.using_ints(unflatten, 1, -1)\n"
        "flatten_1: f32[6, 4] = aten.flatten.using_ints(unflatten_1, 1, -1)\n"
        "linear: f32[s, 6] = aten.linear.default(flatten, flatten_1)\n"
        "permute: f32[6, s77] = aten.permute.default(linear, [1, 0])\nreturn (permute,)",
    ),
}


@pytest.mark.parametrize("dress", DRESSES)
def test_dress(dress: str) -> None:
    call, expected = DRESSES[dress]
    assert body(call, torch.randn(2, 4)) == expected


def test_a_token_dimension_stays() -> None:
    expected = "linear: f32[s, s27, 6] = aten.linear.default(x, w)\nreturn (linear,)"
    assert body(lambda x, m: x @ m.w.t(), torch.randn(2, 3, 4), "batch+sequence") == expected


def test_one_vector_is_a_linear_layer_too() -> None:
    expected = "linear: f32[6] = aten.linear.default(x, w)\nreturn (linear,)"
    assert body(lambda x, m: m.w @ x, torch.randn(4), None) == expected
    assert body(lambda x, m: x @ m.w.t(), torch.randn(4), None) == expected


def test_the_weight_is_an_expression_of_its_parameter() -> None:
    layer = Layer(lambda x, m: x @ m.v.to(torch.float64).to(torch.float32))
    gm = capture(layer, torch.randn(2, 4))
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    found = expression(gm, linear.args[1])
    assert found is not None
    assert (found.path, found.text) == ("v", "to(torch.float64).to(torch.float32).t()")
    assert found.parameter is layer.v
    assert torch.equal(found.apply(layer.v), layer.v.t())


KEPT = {
    "bmm with a constant batch": (lambda x, m: torch.bmm(x, m.batch), (3, 2, 4), "bmm"),
    "matmul with a constant batch": (lambda x, m: x @ m.batch, (3, 2, 4), "matmul"),
    "two activations": (lambda x, m: x @ x.transpose(-1, -2), (2, 4), "matmul"),
}


@pytest.mark.parametrize("what", KEPT)
def test_kept_without_a_word(what: str) -> None:
    call, shape, name = KEPT[what]
    gm = capture(Layer(call), torch.randn(shape))
    assert any(node.name == name for node in gm.graph.nodes)
    assert state(gm).misses == []


MISSES = {
    "vector": (lambda x, m: x @ m.vector, "a product with a constant vector"),
    "batch on the left": (
        lambda x, m: m.batch @ x.t()[:, :6].T,
        "a batch of constant matrices stands on the left",
    ),
    "batch of weights": (lambda x, m: torch.einsum("bj,bj->bj", x, m.v[:2, :4]), "a batch of weights"),
    "outer product": (lambda x, m: torch.einsum("bj,k->bjk", x, m.b), "it is an outer product"),
    "sum of one": (
        lambda x, m: torch.einsum("bj,kj->b", x, m.w),
        "sums over 'k', which only one operand has",
    ),
    "diagonal": (lambda x, m: torch.einsum("bj,jj->bj", x, m.w[:4]), "takes a diagonal"),
    "no new index": (lambda x, m: torch.einsum("bj,j->b", x, m.vector), "adds no index"),
    "tensordot over nothing": (lambda x, m: torch.tensordot(x, m.b, dims=0), "it is an outer product"),
    "three operands": (lambda x, m: torch.einsum("bj,kj,k->bk", x, m.w, m.b), "has 3 operands"),
}


@pytest.mark.parametrize("what", MISSES)
def test_a_miss_says_why(what: str) -> None:
    call, reason = MISSES[what]
    x = torch.randn(6, 4) if "left" in what else torch.randn(2, 4)
    layer = Layer(call)
    gm = capture(layer, x)
    assert [reason in miss.reason for miss in state(gm).misses] == [True]
    assert state(gm).misses[0].asked == "aten.linear"
    assert torch.equal(gm(x), layer(x))


def test_a_product_with_a_table_is_no_miss() -> None:
    gm = capture(Layer(lambda x, m: torch.einsum("bj,j->b", x, m.table[:, 0])), torch.randn(2, 4))
    assert state(gm).misses == []


def test_what_does_nothing_goes() -> None:
    def idle(x: Tensor, m: Layer) -> Tensor:
        with torch.no_grad():
            y = torch.relu(x.to(torch.float32)[:, None])
        return y[:].detach()

    layer = Layer(idle).requires_grad_(False)
    gm = capture(layer, torch.randn(2, 4))
    shown = textwrap.dedent(
        """\
        x: f32[2, 4] = input
        unsqueeze: f32[2, 1, 4] = aten.unsqueeze.default(x, 1)
        relu_1: f32[2, 1, 4] = aten.relu.default(unsqueeze)
        return (relu_1,)"""
    )
    assert str(snapshot(gm)) == shown


def test_where_gradients_flow_a_stop_stays_a_stop() -> None:
    def stops(x: Tensor, m: Layer) -> Tensor:
        with torch.no_grad():
            y = F.linear(x, m.w)
        return y * m.b

    layer = Layer(stops)
    gm = capture(layer, torch.randn(2, 4))
    gm(torch.randn(2, 4)).sum().backward()
    assert layer.w.grad is None
    assert layer.b.grad is not None


def test_twice_is_once() -> None:
    gm = capture(Layer(DRESSES["einsum to heads"][0]), torch.randn(2, 4))
    before = str(snapshot(gm))
    assert Normalize().apply(gm) == 0
    assert str(snapshot(gm)) == before
