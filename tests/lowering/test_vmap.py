"""torch.vmap over quantized layers is the layer of each member.

Other numbers of rows are other kernels, so sums of 64 products differ by up to 64 * 2**-24 * sum |x w|, which
is below 64 * 2**-24 * 8 here.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitfold as bf

WITHIN = {"rtol": 0.0, "atol": 64 * 2**-24 * 8}
INT4 = bf.Recipe("int4", (bf.Rule(weight="int4[g32]"),))
ONE_SCALE = bf.Recipe("one_scale", (bf.Rule(weight="int4[g32]", input="int8[tensor]"),))


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("recipe", ["int8", INT4, "int8_dynamic"], ids=["int8", "int4", "int8_dynamic"])
def test_a_linear_takes_a_batch_along_any_dimension(recipe: str | bf.Recipe, target: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).eval()
    bf.quantize(layer, recipe, target=target)
    x = torch.randn(5, 3, 64)
    expected = torch.stack([layer(one) for one in x])
    torch.testing.assert_close(torch.vmap(layer)(x), expected, **WITHIN)
    torch.testing.assert_close(torch.vmap(layer, in_dims=1, out_dims=1)(x), expected, **WITHIN)
    torch.testing.assert_close(torch.vmap(torch.vmap(layer))(x), expected, **WITHIN)


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_gradients_embeddings_and_convolutions(target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 32)).eval()
    bf.quantize(model, "int8_all", target=target)
    ids = torch.randint(0, 50, (4, 3))
    torch.testing.assert_close(torch.vmap(model)(ids), model(ids), **WITHIN)
    x = torch.randn(4, 64, requires_grad=True)
    (mapped,) = torch.autograd.grad(torch.vmap(model[1])(x).sin().sum(), x)
    (plain,) = torch.autograd.grad(model[1](x).sin().sum(), x)
    torch.testing.assert_close(mapped, plain, **WITHIN)
    conv = bf.quantize(nn.Conv2d(3, 8, 3).eval(), "int8_conv", target=target)
    images = torch.randn(4, 2, 3, 9, 9)
    assert torch.equal(torch.vmap(conv)(images), torch.stack([conv(one) for one in images]))


def test_each_member_may_have_weights_of_its_own() -> None:
    torch.manual_seed(0)
    layer, x = bf.quantize(nn.Linear(64, 32, bias=False).eval(), "int8"), torch.randn(2, 64)

    def call(scales: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"scales": scales}, (x,))

    with torch.no_grad():
        found = torch.vmap(call)(torch.stack([layer.scales, layer.scales * 2]))
        assert torch.equal(found, torch.stack([layer(x), layer(x) * 2]))


def test_a_scale_of_the_whole_tensor_is_that_of_each_member() -> None:
    x = torch.randn(3, 4, 32) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    quantize = torch.ops.bitfold.quantize
    codes, scales = torch.vmap(lambda one: quantize(one, "int8[tensor]"))(x)
    for i, one in enumerate(x):
        expected = quantize(one, "int8[tensor]")
        assert torch.equal(codes[i], expected[0]) and torch.equal(scales[i], expected[1])


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_a_scale_of_all_of_x_is_that_of_each_member(target: str) -> None:
    torch.manual_seed(0)
    layer = bf.quantize(nn.Linear(64, 32).eval(), ONE_SCALE, target=target)
    x = torch.randn(5, 3, 64) * torch.tensor([0.1, 1.0, 0.5, 0.2, 0.7])[:, None, None]
    expected = torch.stack([layer(one) for one in x])
    torch.testing.assert_close(torch.vmap(layer)(x), expected, **WITHIN)


def test_members_may_share_a_scale_of_all_of_x() -> None:
    torch.manual_seed(0)
    layer = bf.quantize(nn.Linear(64, 32).eval(), ONE_SCALE, target="cpu")
    (node,) = layer.body.graph.find_nodes(op="call_function", target=torch.ops.bitfold.fused.default)
    text, (codes, scale) = node.args[1], torch.ops.bitfold.quantize(torch.randn(5, 3, 64), "int8[tensor]")

    def call(codes: torch.Tensor) -> torch.Tensor:
        held = [scale, layer.codes, layer.scales, layer.bias]
        found: torch.Tensor = torch.ops.bitfold.fused([codes, *held], text)[0]
        return found

    with torch.no_grad():
        expected = torch.stack([call(one) for one in codes])
        torch.testing.assert_close(torch.vmap(call)(codes), expected, **WITHIN)


def test_a_batch_of_none_gives_none() -> None:
    layer = bf.quantize(nn.Linear(64, 32).eval(), INT4, target="cpu")
    assert torch.vmap(layer, in_dims=1)(torch.randn(3, 0, 64)).shape == (0, 3, 32)


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_compiled(target: str) -> None:
    torch.manual_seed(0)
    layer, x = bf.quantize(nn.Linear(64, 48).eval(), INT4, target=target), torch.randn(5, 3, 64)

    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda one: layer(one).sin())(x)

    with torch.inference_mode():
        found = torch.compile(call, backend="bitfold")(x)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, call(x).detach(), **WITHIN)


def test_transformed_functions_without_a_weight_are_compiled() -> None:
    x = torch.randn(4, 3)
    for of in (torch.vmap(torch.sin), torch.func.grad(lambda x: x.sin().sum())):
        found = torch.compile(lambda x, of=of: of(x), backend="bitfold")(x)
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, of(x))
