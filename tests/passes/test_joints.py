"""Operators that take activations alone: their operands in codes, numbers defined by the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf
from bitfold.passes import Pipeline, capture
from bitfold.passes.joints import operands
from bitfold.passes.observing.calibrate import calibrate

INT8 = "int8[tensor]"


class Joined(nn.Module):
    """Every kind once; attention as one operator and spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 8)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(self.conv(x), 2)
        tokens = y.flatten(2).transpose(1, 2)
        z = self.fc(tokens)
        s = tokens + z + self.shift  # a constant is no activation
        p = torch.softmax(s @ z.transpose(1, 2) * 0.3, -1)
        attended = F.scaled_dot_product_attention(s[:, None], z[:, None], tokens[:, None])[:, 0]
        return (p @ z) * attended


def model() -> Joined:
    torch.manual_seed(0)
    return Joined().eval()


def images(seed: int = 1) -> list[Tensor]:
    return list(torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))


def recipe(ops: str, fmt: str = INT8, observer: str = "minmax") -> bf.Recipe:
    return bf.Recipe("joints", (bf.Rule(op=ops, input=fmt, observer=observer),))


def folded(ops: str, observer: str = "minmax", fmt: str = INT8) -> torch.fx.GraphModule:
    gm = capture(model(), (images()[0],))
    Pipeline.parse(f"annotate{{recipe={recipe(ops, fmt, observer)}}}").run(gm)
    if observer:
        Pipeline.parse("observe").run(gm)
        calibrate(gm, [(x,) for x in images()])
    Pipeline.parse("fold").run(gm)
    return gm


def edges(ops: str) -> list[tuple[str, int]]:
    gm = capture(model(), (images()[0],))
    Pipeline.parse(f"annotate{{recipe={recipe(ops)}}}").run(gm)
    return [(node.name, len(found.places)) for node in gm.graph.nodes if (found := operands(node))]


def test_which_operators_are_meant() -> None:
    """The sum with a constant and the product with a number take nothing; nor does `*` mean any of them."""
    assert edges("add") == [("add", 2)]
    assert edges("mul") == [("mul_1", 2)]
    assert edges("pool") == [("avg_pool2d", 1)]
    assert edges("softmax") == [("softmax", 1)]
    assert edges("attention") == [("matmul", 2), ("scaled_dot_product_attention", 3), ("matmul_1", 2)]
    assert edges("*") == []


@pytest.mark.parametrize("ops", ["add", "mul", "pool", "softmax", "attention"])
@pytest.mark.parametrize("observer", ["minmax", ""])
def test_operands_are_what_codes_stand_for(ops: str, observer: str) -> None:
    """Near the float model, and not it."""
    x = images()[0]
    gm = folded(ops, observer)
    targets = {node.target for node in gm.graph.nodes}
    assert torch.ops.bitfold.quantize.default in targets
    exact, found = model()(x).detach(), gm(x).detach()
    apart = float((found - exact).norm() / exact.norm())
    assert 0 < apart < 0.1


def test_a_sum_by_hand() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    a, b = torch.randn(4, 16), 5 * torch.randn(4, 16)
    gm = bf.quantize(
        Sum(), recipe("add", observer=""), scope="program", example_inputs=(a, b), target="reference"
    )
    f = bf.format(INT8)
    assert torch.equal(gm(a, b), f.fake_quantize(a) + f.fake_quantize(b))
    per_row = bf.quantize(
        Sum(), recipe("add", "int4[row]", ""), scope="program", example_inputs=(a, b), target="reference"
    )
    f = bf.format("int4[row]")
    assert torch.equal(per_row(a, b), f.fake_quantize(a) + f.fake_quantize(b))


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_whole_model_with_everything_in_codes(target: str) -> None:
    rules = (
        bf.Rule(op="conv|linear", weight="int8", input=INT8, observer="minmax"),
        bf.Rule(op="add|mul|pool|softmax|attention", input=INT8, observer="minmax"),
    )
    gm = bf.quantize(model(), bf.Recipe("all", rules), scope="program", calibration=images(), target=target)
    exact = torch.cat([model()(x) for x in images(2)]).detach()
    found = torch.cat([gm(x) for x in images(2)]).detach()
    assert float((found - exact).norm() / exact.norm()) < 0.1


def test_it_is_saved_and_loaded(tmp_path: object) -> None:
    gm = bf.quantize(
        model(), recipe("add|softmax"), scope="program", calibration=images(), target="reference"
    )
    path = f"{tmp_path}/model.safetensors"
    bf.save(gm, path)
    again = bf.load(path, target="reference")
    with torch.no_grad():  # products of tensors that lie elsewhere may add in another order
        torch.testing.assert_close(again(images(2)[0]), gm(images(2)[0]))


def test_what_cannot_be_is_said() -> None:
    x = images()[0]

    def program(wanted: bf.Recipe) -> None:
        bf.quantize(model(), wanted, scope="program", example_inputs=(x,), target="reference")

    with pytest.raises(bf.BitfoldError, match=r"give calibration"):
        program(recipe("add"))
    with pytest.raises(bf.BitfoldError, match="one scale a tensor"):
        program(recipe("attention", "int8", ""))
    with pytest.raises(bf.BitfoldError, match="an image takes one scale"):
        program(recipe("pool", "int8", ""))
    with pytest.raises(bf.BitfoldError, match="has no weight"):
        program(bf.Recipe("w", (bf.Rule(op="add", weight="int8", input=INT8),)))
    with pytest.raises(bf.BitfoldError, match="scope='program'"):
        bf.quantize(model(), recipe("add", observer=""), target="reference")


class Summed(nn.Module):
    """A sum in place, and who sees it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h, y = self.a(x), self.b(x)
        view, dropped = h.view(-1), F.dropout(h, training=self.training)
        if self.how == "part":
            h[:, :16] += y[:, :16]
            return self.c(h)
        if self.how == "argument":
            x += y
            return self.c(x)
        h += y
        if self.how == "view":
            return self.c(view.view(h.shape))
        return self.c(dropped if self.how == "dropout" else F.relu_(h)) + h.view(-1).view(h.shape)


@pytest.mark.parametrize("how", ["plain", "part", "view", "dropout", "argument"])
def test_a_sum_in_place_is_seen_where_it_was(how: str) -> None:
    torch.manual_seed(0)
    summed, x = Summed(how).eval(), torch.randn(16, 32)
    wanted = recipe("add", observer="")
    if how in ("plain", "part"):
        gm = bf.quantize(summed, wanted, scope="program", example_inputs=(x,), target="reference")
        exact = summed(x).detach()
        assert 0 < float((gm(x).detach() - exact).norm() / exact.norm()) < 0.02
        return
    with pytest.raises(bf.BitfoldError, match=r"what it writes to is seen by .* write x = x \+ y"):
        bf.quantize(summed, wanted, scope="program", example_inputs=(x,), target="reference")


class Masked(nn.Module):
    """Attention that is spelled out, with scores hidden in one of the ways that models do it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)
        self.near = nn.Embedding(8, 1)
        self.how = how

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / 32**0.5
        hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
        if self.how == "fill":
            scores = scores.masked_fill(hidden, -1e9)
        elif self.how == "where":
            scores = scores + torch.where(mask == 0, 0.0, torch.finfo(x.dtype).min)
        elif self.how == "argument":
            scores += mask
        elif self.how == "constant":
            scores = scores + torch.full((8, 8), -torch.inf).triu(1)
        elif self.how == "bias":
            scores = scores + self.near(torch.arange(8))[:, 0]
        elif self.how == "small":
            scores = scores + 0.1 * torch.arange(8.0)
        return torch.softmax(scores, -1) @ x


MASK = torch.full((8, 8), -torch.inf).triu(1)


@pytest.mark.parametrize("how", ["fill", "where", "argument", "constant", "bias", "small", "none"])
def test_masked_scores_are_left_alone(how: str) -> None:
    torch.manual_seed(0)
    model, batch = Masked(how).eval(), (torch.randn(2, 8, 32), MASK)

    def edges(on_misfit: str, fmt: str = INT8) -> int:
        gm = capture(model, batch)
        wanted = bf.Recipe("s", (bf.Rule(op="softmax", input=fmt, on_misfit=on_misfit),))
        Pipeline.parse(f"annotate{{recipe={wanted}}}").run(gm)
        return sum(operands(node) is not None for node in gm.graph.nodes)

    if how in ("bias", "small", "none"):
        assert edges("error") == 1
        return
    assert edges("report") == 0
    assert edges("error", "float8_e5m2[unscaled]") == 1
    with pytest.raises(bf.BitfoldError, match=r"softmax of .*: its scores are masked by"):
        edges("error")
