"""`bf.quantize` in module scope: what is folded, what is refused, what a failure leaves behind."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.passes.rules import Rule


class Block(nn.Module):
    """A residual block with a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.relu(self.up(x)))
        return self.lm_head(self.norm(x))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 4, (3, 2), stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).unflatten(2, (4, 4)))


def fake_quantized(model: nn.Module, formats: dict[str, str]) -> nn.Module:
    """The reference: a copy whose named weights are rounded to their formats and stay floats."""
    twin = copy.deepcopy(model)
    for path, text in formats.items():
        weight = twin.get_parameter(f"{path}.weight")
        rows = weight.detach().reshape(weight.shape[0], -1)
        fmt = bf.format(text)
        with torch.no_grad():
            weight.copy_(fmt.dequantize(fmt.quantize(rows)).reshape(weight.shape))
    return twin


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    "text", ["int8", "int4[g32]", "uint4[g64,zero]", "float8_e4m3fn", "mxfp4", "nf4[g64]", "int5"]
)
def test_codes_and_values_are_those_of_the_format(text: str) -> None:
    model = Block()
    expected = fake_quantized(model, {"up": text, "down": text})
    codes = bf.format(text).quantize(model.up.weight.detach())
    tokens = torch.randint(0, 50, (2, 5))
    assert bf.quantize(model, text, target="reference") is model
    parts = [getattr(model.up, part) for part in model.up.folded_weights[0].parts]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(parts, codes.parts, strict=True))
    assert torch.equal(model.up.weight, expected.up.weight)
    assert torch.equal(model(tokens), expected(tokens))
    assert type(model.embed) is nn.Embedding and type(model.lm_head) is nn.Linear


def test_all_recipes_fold_head_and_embedding_once() -> None:
    model = Block()
    expected = fake_quantized(model, {"up": "int8", "down": "int8", "embed": "int8"})
    bf.quantize(model, "int8_all", target="reference")
    assert model.lm_head.codes is model.embed.codes and model.lm_head.scales is model.embed.scales
    tokens = torch.randint(0, 50, (2, 5))
    assert torch.equal(model(tokens), expected(tokens))
    report = bf.report(model)
    assert [(layer.path, layer.tied_to) for layer in report.layers] == [
        ("embed", ""),
        ("up", ""),
        ("down", ""),
        ("lm_head", "embed"),
    ]
    assert report.bytes_before == sum(p.nbytes for p in expected.parameters())
    assert report.bytes_after == sum(p.nbytes for p in model.parameters())


def test_a_half_precision_model() -> None:
    model = Block().bfloat16()
    weight, fmt = model.up.weight.detach().clone(), bf.format("int4[g32]")
    bf.quantize(model, "int4[g32]", target="reference")
    assert torch.equal(model.up.codes, fmt.quantize(weight).codes) and model.up.weight.dtype == torch.bfloat16
    assert model(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.bfloat16


def test_only_the_input_of_a_layer() -> None:
    model = Block()
    expected = copy.deepcopy(model)
    bf.quantize(model, bf.Recipe("in", (Rule("up", input="int8"),)), target="reference")
    fmt, x = bf.format("int8"), torch.randn(3, 64)
    assert isinstance(model.up.weight, nn.Parameter) and model.up.weight.requires_grad
    assert torch.equal(model.up(x), expected.up(fmt.fake_quantize(x)))


def test_codes_made_in_inference_mode_train_with_an_adapter() -> None:
    with torch.inference_mode():
        model = bf.quantize(Block(), "int8", target="reference")
    x = torch.randn(2, 64, requires_grad=True)
    model.up(x).sum().backward()
    assert x.grad is not None


def test_ties_in_two_formats_are_kept_twice_and_said() -> None:
    model = Block()
    recipe = bf.Recipe("mixed", (Rule(op="head", weight="int4[g32]"), Rule(op="embedding", weight="int8")))
    bf.quantize(model, recipe, target="reference")
    assert model.embed.folded_weights[0].format == "int8"
    assert model.lm_head.folded_weights[0].format == "int4[g32]"
    assert "tied to embed" in str(bf.report(model).misses[0])


def test_convolutions() -> None:
    model = Convolutions()
    expected = fake_quantized(model, {"one": "int8[narrow]", "two": "int8[narrow]"})
    bf.quantize(model, "int8_conv", target="reference")
    x = torch.randn(5, 3, 16)
    assert torch.equal(model(x), expected(x))
    assert model.two.weight.shape == (4, 4, 3, 2) and torch.equal(model.two.weight, expected.two.weight)


def test_a_root_module_is_folded_in_place() -> None:
    linear = nn.Linear(8, 4)
    assert bf.quantize(linear, "int8", target="reference") is linear
    assert isinstance(linear, nn.Linear) and linear.codes.shape == (4, 8)


def test_float_weights_are_freed_one_by_one() -> None:
    model = Block()
    alive = {
        name: weakref.ref(p) for name, p in model.named_parameters() if name in ("up.weight", "down.weight")
    }
    seen: list[int] = []
    bf.quantize(
        model,
        "int8",
        target="reference",
        progress=lambda what, done, total: (
            seen.append(sum(r() is not None for r in alive.values())) if what.startswith("fold") else None
        ),
    )
    gc.collect()
    assert all(ref() is None for ref in alive.values())
    assert seen == [2, 1, 0]


def test_hooks_and_flags_stay() -> None:
    model = Block().eval()
    calls: list[str] = []
    model.up.register_forward_hook(lambda *_: calls.append("up"))
    bf.quantize(model, "int8", target="reference")
    model(torch.zeros(1, 2, dtype=torch.long))
    assert calls == ["up"] and not model.up.training
    model.train()
    assert model.up.training


def test_codes_of_a_checkpoint_are_taken_as_they_are() -> None:
    model = Block()
    fmt = bf.format("q4_1")
    given = fmt.quantize(torch.randn(128, 64))
    bf.quantize(
        model,
        "stored",
        stored={"up.weight": given, "embed.weight": bf.format("q8_0").quantize(torch.randn(50, 64))},
        target="reference",
    )
    assert torch.equal(model.up.codes, given.codes) and model.up.folded_weights[0].format == "q4_1"
    assert model.lm_head.codes is model.embed.codes
    assert "no codes for this weight" in str(bf.report(model).misses[0])


def test_static_activations_are_calibrated() -> None:
    model = Block()
    batches = [torch.randint(0, 50, (2, 5)) for _ in range(3)]
    seen: list[Tensor] = []
    handle = model.up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches:
        model(batch)
    handle.remove()
    model.train()
    bf.quantize(model, "int8_static", calibration=(b for b in batches), target="reference")
    assert model.training
    fmt = bf.format("int8[tensor]")
    every = torch.cat(seen)
    (scale,) = fmt.from_range(every.min().reshape(1, 1), every.max().reshape(1, 1))
    assert torch.equal(
        model.up.x_scales
        if hasattr(model.up, "x_scales")
        else model.up.get_parameter(next(n for n in model.up.parts if "input" in n)),
        scale,
    )


def test_attention_reads_the_decoded_weight() -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    expected = fake_quantized(attention, {"out_proj": "int8"})
    x = torch.randn(2, 5, 32)
    bf.quantize(attention, "int8", target="reference")
    assert torch.equal(attention(x, x, x)[0], expected(x, x, x)[0])


WRONG: dict[str, tuple[str, dict[str, object], str]] = {
    "recipe": ("int44", {}, "did you mean"),
    "group": ("int8[g48]", {}, r"layer up.*64.*48|layer up.*48.*64"),
    "scope": ("int8", {"scope": "modul"}, "may be 'module'"),
    "stored path": ("stored", {"stored": {"upp.weight": None}}, "did you mean 'up.weight'"),
    "no calibration": ("int8_static", {}, "layer up.*calibration="),
    "empty calibration": ("int8_static", {"calibration": []}, "no batches"),
    "one tensor": ("int8_static", {"calibration": torch.zeros(2, 3)}, "a list"),
    "calibration shape": ("int8_static", {"calibration": [torch.zeros(2, 3)]}, "batch 0 with shapes"),
    "program without inputs": ("int8", {"scope": "program"}, "example_inputs"),
    "target": ("int8", {"target": "cpuu"}, "cpu"),
    "nothing to do": ("int8_conv", {}, "found nothing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_change_nothing(case: str) -> None:
    recipe, options, message = WRONG[case]
    model = nn.Sequential(nn.Embedding(4, 4)) if case == "nothing to do" else Block()
    before, kinds = bytes_of(model), [type(m) for m in model.modules()]
    with pytest.raises(bf.BitfoldError, match=message):
        bf.quantize(model, recipe, **{"target": "reference", **options})
    assert bytes_of(model) == before and [type(m) for m in model.modules()] == kinds
    assert "bitfold_misses" not in model.__dict__


def test_nan_is_found_before_the_first_write() -> None:
    model = Block()
    with torch.no_grad():
        model.down.weight[3, 4] = float("nan")
    before = bytes_of(model)
    with pytest.raises(bf.BitfoldError, match=r"layer down.*NaN"):
        bf.quantize(model, "int8", target="reference")
    assert bytes_of(model) == before and type(model.up) is nn.Linear


def test_nan_in_calibration_data() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    batches = [torch.randn(2, 8), torch.full((2, 8), float("nan"))]
    with pytest.raises(bf.BitfoldError, match="calibration batch 1 has NaN or infinity in argument 0"):
        bf.quantize(model, "int8_static", calibration=batches, target="reference")
    assert type(model[0]) is nn.Linear and not model[0]._forward_pre_hooks


def test_meta_and_lazy_models_are_refused() -> None:
    with torch.device("meta"):
        skeleton = Block()
    with pytest.raises(bf.BitfoldError, match=r"embed\.weight is on the meta device"):
        bf.quantize(skeleton, "int8")
    with pytest.raises(bf.BitfoldError, match="lazy"):
        bf.quantize(nn.Sequential(nn.LazyLinear(4)), "int8")


def test_a_failure_midway_names_what_is_folded_and_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Block()
    expected = fake_quantized(model, {"up": "int8", "down": "int8"})
    quantize = bf.Format.quantize

    def failing(self: bf.Format, x: Tensor, params: object = None) -> object:
        if x.shape == (64, 128) and not failed:
            failed.append("down")
            raise MemoryError("cannot allocate 64 bytes")
        return quantize(self, x, params)

    failed: list[str] = []
    monkeypatch.setattr(bf.Format, "quantize", failing)
    with pytest.raises(
        bf.BitfoldError, match=r"down.*1 of 2 modules folded \(up\).*goes on from there"
    ) as caught:
        bf.quantize(model, "int8", target="reference")
    assert isinstance(caught.value.__cause__, Exception)
    assert hasattr(model.up, "codes") and type(model.down) is nn.Linear
    tokens = torch.randint(0, 50, (2, 5))
    model(tokens)
    bf.quantize(model, "int8", target="reference")
    assert torch.equal(model(tokens), expected(tokens))


def test_a_report_prints() -> None:
    model = Block()
    recipe = bf.Recipe.parse("int8").but(Rule("down", skip="it is sensitive"))
    bf.quantize(model, recipe, target="reference")
    assert str(bf.report(model)) == (
        "layer            format     was       is\n"
        "up               int8       32.0 KiB  8.5 KiB\n"
        "everything else  as it was  45.5 KiB  45.5 KiB\n"
        "total                       77.5 KiB  54.0 KiB\n"
        "\n"
        "asked for and not given:\n"
        "  down: linear down: left alone (it is sensitive): it is sensitive"
    )
    with pytest.raises(bf.BitfoldError, match="nothing in this Block is folded"):
        bf.report(Block())


def test_example_inputs_and_batches_made_in_inference_mode() -> None:
    """Of such tensors autograd records nothing, and refuses to be asked."""

    class Odd(nn.Module):  # of a kind that must be traced with inputs
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight)

    with torch.inference_mode():
        x = torch.randn(2, 64)
        bf.quantize(odd := Odd(), "int8", example_inputs=(x,))
        bf.quantize(plain := nn.Sequential(nn.Linear(64, 64)), "int8_static", calibration=[x, (x,)])
        assert odd(x).shape == plain(x).shape == (2, 64)
    assert not odd.weight.requires_grad and bf.report(odd).misses == bf.report(plain).misses == ()
