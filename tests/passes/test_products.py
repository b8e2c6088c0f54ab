"""Weights in unusual dress: pieces of one parameter, sparse tensors, products that no pass takes apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.formats import format
from bitfold.passes import Pipeline, capture, expression, snapshot

INT8 = "annotate{recipe=int8},fold"


class Layer(nn.Module):
    """`call(x, w)` with one parameter, by default [48, 32]."""

    def __init__(self, call: Callable[[Tensor, Tensor], Any], *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call = call
        self.w = nn.Parameter(torch.randn(shape or (48, 32)))

    def forward(self, x: Tensor) -> Any:
        return self.call(x, self.w)


CUTS: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda w: w.chunk(3),
    "chunk, uneven": lambda w: w[:47].chunk(3),
    "split": lambda w: w.split(16),
    "split by sizes": lambda w: w.split([8, 24, 16]),
    "split_with_sizes": lambda w: torch.split_with_sizes(w, [8, 24, 16]),
    "tensor_split": lambda w: torch.tensor_split(w, 3),
    "tensor_split at": lambda w: torch.tensor_split(w, (8, 20)),
    "unbind": lambda w: w.view(3, 16, 32).unbind(),
    "chunk of the columns": lambda w: w.t().contiguous().chunk(3, -1)[1:2],
}


@pytest.mark.parametrize("how", CUTS)
def test_a_piece_of_a_weight_is_a_weight(how: str) -> None:
    def products(x: Tensor, w: Tensor) -> list[Tensor]:
        return [x[:, : piece.shape[-1]] @ piece.T for piece in CUTS[how](w)]

    layer, x = Layer(products), torch.randn(2, 32)
    gm = capture(layer, (x,))
    pieces = [piece.detach() for piece in CUTS[how](layer.w)]
    linears = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    for node, piece in zip(linears, pieces, strict=True):
        found = expression(gm, node.args[1])
        assert found is not None and torch.equal(found.apply(layer.w), piece)
    trace = Pipeline.parse(INT8).run(gm)
    assert trace.misses == []
    wanted = [F.linear(x[:, : p.shape[-1]], format("int8").fake_quantize(p.contiguous())) for p in pieces]
    assert all(torch.equal(a, b) for a, b in zip(gm(x), wanted, strict=True))
    assert "f32" not in "".join(str(node) for node in snapshot(gm) if node.name.startswith("w_codes"))
    assert not [name for name, _ in gm.named_parameters()]


def test_a_decoder_that_cuts_its_projections_is_quantized_whole() -> None:
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval()
    x, memory = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    trace = Pipeline.parse(INT8).run(capture(layer, (x, memory)))
    # Self-attention: one projection for all and one out; the other: two pieces and one out; two linears.
    assert (trace.steps[1].rewrites, trace.misses) == (7, [])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_weight_is_left_and_reported(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(32, 32)
            self.sparse = nn.Parameter(getattr(torch.randn(8, 32).relu(), kind)())

        def forward(self, x: Tensor) -> Tensor:
            return self.sparse @ self.dense(x).t()

    model, x = Model(), torch.randn(3, 32)
    gm = capture(model, (x,))
    trace = Pipeline.parse(INT8).run(gm)
    assert [miss.reason for miss in trace.misses] == [
        "its weight is a sparse tensor, and only dense ones are quantized"
    ]
    assert trace.steps[1].rewrites == 1 and gm(x).shape == (8, 3)


UNTAKEN: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], Tensor, str]] = {
    "multi_dot": (lambda x, w: torch.linalg.multi_dot([x, w.t(), w]), (48, 32), torch.randn(2, 32), "linear"),
    "addmv": (lambda x, w: torch.addmv(x.new_zeros(48), w, x), (48, 32), torch.randn(32), "linear"),
    "addbmm": (
        lambda x, w: torch.addbmm(x.new_zeros(2, 8), x, w),
        (3, 32, 8),
        torch.randn(3, 2, 32),
        "linear",
    ),
    "brackets": (lambda x, w: w[x], (48, 32), torch.tensor([1, 2]), "embedding"),
    "index_select": (lambda x, w: w.index_select(0, x), (48, 32), torch.tensor([1, 2]), "embedding"),
}


@pytest.mark.parametrize("what", UNTAKEN)
def test_a_product_that_is_not_taken_is_reported(what: str) -> None:
    call, shape, x, op = UNTAKEN[what]
    recipe = f'annotate{{recipe={{"rules": [{{"op": "{op}", "weight": "int8"}}]}}}}'
    trace = Pipeline.parse(recipe).run(capture(Layer(call, *shape), (x,)))
    (miss,) = trace.misses
    assert what in miss.reason and miss.asked == f"{op} *: weight int8"
    other = "embedding" if op == "linear" else "linear"
    quiet = Pipeline.parse(recipe.replace(op, other)).run(capture(Layer(call, *shape), (x,)))
    assert quiet.misses == []
