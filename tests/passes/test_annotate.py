"""Annotate: every dress of a layer is found, what cannot be done is said, an error writes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.formats import BitfoldError, Quantized, format
from bitfold.passes import Annotate, Pipeline, Recipe, Rule, annotated, capture, snapshot, state


class Dresses(nn.Module):
    """A linear in all its dresses, convolutions, a table, experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.fc = nn.Linear(16, 16)
        self.functional = nn.Parameter(torch.randn(16, 16))
        self.right = nn.Parameter(torch.randn(16, 16))
        self.bias = nn.Parameter(torch.randn(16))
        self.experts = nn.Parameter(torch.randn(2, 16, 16))
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.image = nn.Conv2d(1, 4, 3, padding="same")
        self.head = nn.Linear(16, 40, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fc(self.embed(tokens))
        x = F.linear(x, self.functional)
        x = x @ self.right
        x = x @ self.right.t()
        x = torch.einsum("bij,kj->bik", x, self.functional)
        x = torch.addmm(self.bias, x.flatten(0, 1), self.right).unflatten(0, tokens.shape)
        x = torch.bmm(x, self.experts)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x), self.image(x.unsqueeze(1))


def graph(model: nn.Module | None = None, *inputs: Tensor) -> torch.fx.GraphModule:
    return capture(model or Dresses(), inputs or (torch.zeros(2, 8, dtype=torch.int64),))


def notes(gm: torch.fx.GraphModule) -> list[str]:
    return [f"{note.anchor} {note.layer}: {note}" for _, note in annotated(gm)]


def test_every_dress_is_found() -> None:
    gm = graph()
    Pipeline([Annotate(Recipe("all", (Rule(op="*", weight="int8"),)))]).run(gm)
    assert notes(gm) == [
        "embedding embed: int8 weight",
        "linear fc: int8 weight",
        "linear functional: int8 weight",
        "linear right: int8 weight",
        "linear right: int8 weight",
        "linear functional: int8 weight",
        "linear right: int8 weight",
        "bmm experts: int8 weight",
        "conv1d conv: int8 weight",
        "linear head: int8 weight",
        "conv2d image: int8 weight",
    ]
    assert state(gm).misses == []


def test_op_kinds_divide_the_layers() -> None:
    found = {}
    for op in ("linear", "head", "conv", "embedding"):
        gm = graph()
        Pipeline([Annotate(Recipe("one", (Rule(op=op, weight="int8"),)))]).run(gm)
        found[op] = [note.layer for _, note in annotated(gm)]
    assert found["head"] == ["head"]
    assert found["conv"] == ["conv", "image"]
    assert found["embedding"] == ["embed"]
    assert found["linear"] == ["fc", "functional", "right", "right", "functional", "right", "experts"]


def test_the_snapshot_carries_the_note() -> None:
    gm = graph(nn.Linear(8, 4), torch.zeros(2, 8))
    Pipeline.parse("annotate{recipe=int8_dynamic}").run(gm)
    assert str(snapshot(gm)) == "\n".join(
        [
            "weight: f32[4, 8] = self.weight",
            "bias: f32[4] = self.bias",
            "input_1: f32[2, 8] = input",
            "linear: f32[2, 4] = aten.linear.default(input_1, weight, bias)  # int8 weight, int8 input",
            "return (linear,)",
        ]
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.proj = nn.Linear(16, 40, bias=False)
        self.proj.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(self.embed(tokens))


def test_a_linear_tied_to_an_embedding_is_a_head() -> None:
    gm = graph(Tied())
    Pipeline.parse("annotate{recipe=int8}").run(gm)
    assert notes(gm) == []
    Pipeline([Annotate("int8_all")]).run(again := graph(Tied()))
    assert notes(again) == ["embedding embed: int8 weight", "linear proj: int8 weight"]


def test_tied_weights_in_two_formats_are_reported() -> None:
    gm = graph(Tied())
    recipe = Recipe("two", (Rule(op="head", weight="int8"), Rule(op="embedding", weight="int4[g16]")))
    trace = Pipeline([Annotate(recipe)]).run(gm)
    assert [str(miss.reason) for miss in trace.misses] == [
        "the weight is tied to embed, which takes int4[g16], so it is stored in both formats"
    ]


def test_heads_that_the_graph_does_not_show_can_be_named() -> None:
    gm = graph(nn.Sequential(nn.Linear(8, 4)), torch.zeros(2, 8))
    Pipeline.parse('annotate{recipe=int8,heads="0 other"}').run(gm)
    assert notes(gm) == []


def test_a_skip_is_reported_with_its_reason() -> None:
    gm = graph(nn.Sequential(nn.Linear(8, 4)), torch.zeros(2, 8))
    trace = Pipeline([Annotate(Recipe.parse("int8").but(Rule("0", skip="too sensitive")))]).run(gm)
    assert notes(gm) == []
    assert [(miss.module_path, miss.asked, miss.reason) for miss in trace.misses] == [
        ("0", "linear 0: left alone (too sensitive)", "too sensitive")
    ]


def test_a_rule_that_names_no_layer_is_reported() -> None:
    gm = graph(nn.Sequential(nn.Linear(8, 4)), torch.zeros(2, 8))
    recipe = Recipe.parse("int8").but(Rule("1", weight="int4"), Rule("0", op="conv", weight="int4"))
    trace = Pipeline([Annotate(recipe)]).run(gm)
    assert [(miss.asked, miss.reason) for miss in trace.misses] == [
        ("linear 1: weight int4", "no layer matches this rule"),
        ("conv 0: weight int4", "no layer matches this rule; did you mean '0'?"),
    ]


class Computed(nn.Module):
    """Layers that the passes do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(8, 8, 2)
        self.bag = nn.EmbeddingBag(10, 8)
        self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))
        self.left = nn.Parameter(torch.randn(2, 5, 4))
        self.register_buffer("window", torch.randn(8, 8))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = F.linear(x, self.window) + torch.bmm(self.left, x)[:, :4]
        return (
            F.linear(self.up(x.transpose(1, 2)).transpose(1, 2), self.a @ self.b) + self.bag(tokens)[:, None]
        )


def test_what_a_recipe_means_and_no_pass_takes_is_reported() -> None:
    gm = graph(Computed(), torch.zeros(2, 4, 8), torch.zeros(2, 3, dtype=torch.int64))
    trace = Pipeline([Annotate(Recipe("all", (Rule(op="*", weight="int8"),)))]).run(gm)
    assert {(miss.module_path, miss.reason) for miss in trace.misses} >= {
        ("up", "a transposed convolution is not quantized"),
        ("bag", "an embedding bag is not quantized"),
        ("", "its weight is computed in each call, so there is nothing to store"),
        ("", "its weight is a buffer, and only parameters are quantized"),
        ("", "its weight is the left operand; write it as linear, or on the right"),
    }
    assert notes(gm) == []


MISFITS = {
    "int4[g24]": "layer fc: its weight of shape [16, 16] cannot take int4[g24]: a group of 24 does not",
    "int4[5x16]": "5 rows a block do not divide the 16 rows",
}


@pytest.mark.parametrize("text", MISFITS)
def test_a_format_that_does_not_fit_is_an_error_and_nothing_is_written(text: str) -> None:
    gm = graph()
    before = str(snapshot(gm))
    recipe = Recipe("bad", (Rule(op="embedding", weight="int8"), Rule("fc", weight=text)))
    with pytest.raises(BitfoldError) as caught:
        Pipeline([Annotate(recipe)]).run(gm)
    assert MISFITS[text] in str(caught.value)
    assert str(snapshot(gm)) == before
    assert state(gm).misses == []


def test_a_misfit_is_reported_if_the_rule_says_so() -> None:
    gm = graph()
    recipe = Recipe(
        "mild", (Rule("fc", weight="int4[g24]", on_misfit="report"), Rule("right", weight="int8"))
    )
    trace = Pipeline([Annotate(recipe)]).run(gm)
    assert {note.layer for _, note in annotated(gm)} == {"right"}
    assert [miss.reason for miss in trace.misses] == [
        "its weight of shape [16, 16] cannot take int4[g24]: a group of 24 does not divide the last "
        "dimension 16 of shape (16, 16); these do: 16"
    ]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_an_error(poison: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[3, 4] = poison
    gm = graph(model, torch.zeros(2, 8))
    with pytest.raises(BitfoldError, match="layer 1: its weight has NaN or infinity in it"):
        Pipeline([Annotate("int8")]).run(gm)
    assert notes(gm) == []


def test_a_weight_on_meta_is_an_error() -> None:
    gm = graph(nn.Linear(8, 8).to("meta"), torch.zeros(2, 8, device="meta"))
    with pytest.raises(BitfoldError, match="is on the meta device and has no numbers; load the weights"):
        Pipeline([Annotate("int8")]).run(gm)


ACTIVATIONS = {
    "grouped input": (
        nn.Linear(24, 8),
        (2, 24),
        Rule(weight="int8", input="int8[g16]"),
        "its input with a last",
    ),
    "static rows": (
        nn.Linear(8, 8),
        (2, 8),
        Rule(weight="int8", input="int8", observer="minmax"),
        "a calibrated input takes one scale a tensor, not int8; write int8[tensor]",
    ),
    "rows of an image": (
        nn.Conv1d(4, 4, 3),
        (2, 4, 8),
        Rule(op="conv", weight="int8", input="int8"),
        "a convolution's input takes one scale a tensor, not int8; write int8[tensor]",
    ),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_an_activation_format_that_does_not_fit_is_an_error(case: str) -> None:
    model, shape, rule, expected = ACTIVATIONS[case]
    with pytest.raises(BitfoldError) as caught:
        Pipeline([Annotate(Recipe("bad", (rule,)))]).run(graph(nn.Sequential(model), torch.zeros(shape)))
    assert expected in str(caught.value)


def test_codes_of_a_checkpoint_are_taken_where_format_and_path_agree() -> None:
    def with_codes(recipe: str) -> tuple[list[str], list[str]]:
        gm = graph(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8)), torch.zeros(2, 32))
        weight = gm.get_parameter("0.weight").detach()
        state(gm).stored = {"0.weight": format("q8_0").quantize(weight)}
        trace = Pipeline([Annotate(recipe)]).run(gm)
        return notes(gm), [miss.reason for miss in trace.misses]

    assert with_codes("stored") == (
        ["linear 0: q8_0 (stored) weight"],
        ["the checkpoint has no codes for this weight"],
    )
    assert with_codes("int8")[0] == ["linear 0: int8 weight", "linear 1: int8 weight"]


def test_codes_of_the_wrong_shape_are_an_error() -> None:
    gm = graph(nn.Sequential(nn.Linear(32, 8)), torch.zeros(2, 32))
    state(gm).stored = {"0.weight": format("q8_0").quantize(torch.zeros(4, 32))}
    with pytest.raises(
        BitfoldError, match=r"layer 0: the codes given for it have shape \[4, 32\], its weight \[8, 32\]"
    ):
        Pipeline([Annotate("stored")]).run(gm)
    assert isinstance(state(gm).stored["0.weight"], Quantized)


def test_the_pass_prints_and_parses_with_any_recipe() -> None:
    recipe = Recipe.parse("int4").but(Rule("re:a{2},b", where="K > 1", skip='it, {said} "so"'))
    pipeline = Pipeline([Annotate(recipe)])
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert str(Pipeline([Annotate("int4[g64]")])) == "annotate{recipe=int4[g64]}"


@pytest.mark.parametrize(
    ("text", "number", "dtype"),
    [
        ("int8", 1e60, torch.float64),
        ("int4[g32]", 3.3e38, torch.float32),
        ("q4_1", 3.3e38, torch.float32),
        ("q4_0", 1e7, torch.float32),
        ("ternary", 3.3e38, torch.float32),
    ],
)
def test_a_weight_beyond_what_the_format_holds_is_an_error(
    text: str, number: float, dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32)).to(dtype)
    with torch.no_grad():
        model[0].weight[3, 4:6] = torch.tensor([number, -number], dtype=dtype)
    gm = graph(model, torch.zeros(2, 32, dtype=dtype))
    with pytest.raises(BitfoldError, match=r"layer 0: its weight goes from -.* further than"):
        Pipeline([Annotate(Recipe("one", (Rule(match="0", weight=text),)))]).run(gm)
    assert notes(gm) == []
