"""Training on rounded numbers, module scope: what trains is what is converted, bit for bit, in any loop."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bitfold as bf
from bitfold.formats import describe, format
from bitfold.lowering.folded import Folded
from bitfold.lowering.prepared import Prepared
from bitfold.passes.rules import Rule

CATALOG = [row.name for row in describe()]
GRANULARITIES = ["", "row", "tensor", "g16", "8x16"]
KINDS = ["linear", "embedding", "conv1d", "conv2d"]
FEW = [
    "int8",
    "int4[g16]",
    "uint4[g16,zero]",
    "int2[tensor]",
    "float8_e4m3fn[8x16]",
    "mxfp4",
    "nvfp4",
    "ternary",
]
OPTIONS = {
    "straight": bf.Qat(),
    "lsq": bf.Qat("lsq", "lsq"),
    "smooth": bf.Qat("smooth:4+stochastic", "clip"),
}


def made(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer of every kind whose rows are 32 long, and an input."""
    if kind == "linear":
        return nn.Linear(32, 16), torch.randn(3, 5, 32)
    if kind == "embedding":
        return nn.Embedding(16, 32, padding_idx=3), torch.randint(0, 16, (3, 5))
    if kind == "conv1d":
        return nn.Conv1d(16, 16, 2, stride=2), torch.randn(2, 16, 9)
    return nn.Conv2d(16, 8, (2, 2), padding=1, groups=2), torch.randn(2, 16, 5, 4)


def spelled(name: str, grain: str) -> str | None:
    """The format `name` with another granularity; None if it has none, or the same."""
    fmt = format(name)
    if fmt.scale is None or not grain:
        return name if not grain else None
    inside = str(fmt)
    parts = inside[inside.index("[") + 1 : -1].split(",") if "[" in inside else []
    known = ("row", "tensor")
    kept = [p for p in parts if p not in known and not (p[0] == "g" and p[1:].isdigit()) and "x" not in p]
    text = f"{fmt.element.name}[{','.join([grain, *kept])}]"
    return text if str(format(text)) != inside else None


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    model(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    bf.advance(model)


def check(kind: str, rule: Rule, how: bf.Qat, dtype: torch.dtype) -> None:
    """Prepare, train two steps, and hold the converted layer against the prepared one in eval."""
    layer, x = made(kind)
    model = nn.Sequential(layer).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    calibration = [x] if rule.observer else None
    bf.prepare_qat(model, bf.Recipe("one", (rule,)), how, calibration=calibration)
    start = layer.weight.detach().clone()
    optimizer = torch.optim.Adam(bf.parameter_groups(model, lr=0.02, scale_lr=0.001))
    for _ in range(2):
        step(model, x, optimizer)
    assert not torch.equal(layer.weight, start) or rule.weight.startswith("int1_twos")
    model.eval()
    with torch.no_grad():
        expected = model(x)
    bf.convert(model, target="reference")
    assert isinstance(layer, Folded) and not isinstance(layer, Prepared)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert expected.dtype == dtype and bool(expected.isfinite().all())


def takes(text: str, kind: str) -> bool:
    shape = tuple(made(kind)[0].weight.flatten(1).shape)
    try:
        format(text).check(shape)
    except bf.FormatError:
        return False
    return True


PRODUCT = [
    (text, kind)
    for name in CATALOG
    for grain in GRANULARITIES
    if (text := spelled(name, grain)) is not None
    for kind in KINDS
    if takes(text, kind)
]


def test_the_product_leaves_no_format_of_the_catalog_out() -> None:
    covered = {str(format(text)) for text, _ in PRODUCT}
    # Rows of these layers are 32 long.
    longer = {"int4[g128]", "uint4[g128,zero]", "tinygemm"}
    assert {str(format(name)) for name in CATALOG if name not in longer} <= covered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", FEW)
def test_what_trained_is_what_is_converted(text: str, kind: str) -> None:
    for name, dtype in (("straight", torch.float32), ("lsq", torch.bfloat16), ("smooth", torch.float32)):
        torch.manual_seed(0)
        check(kind, Rule(op="*", weight=text), OPTIONS[name], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("how", ["straight", "lsq"])
@pytest.mark.parametrize("text,kind", PRODUCT)
def test_every_format_granularity_and_kind(text: str, kind: str, how: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(kind, Rule(op="*", weight=text), OPTIONS[how], dtype)


DYNAMIC = ["int8", "int4[g16]", "uint8[zero]", "mxfp8", "nvfp4"]
STATIC = ["int8[tensor]", "uint4[tensor,zero]", "float8_e5m2[tensor]"]


@pytest.mark.parametrize("text", [*DYNAMIC, *STATIC])
def test_activations_too(text: str) -> None:
    torch.manual_seed(0)
    rule = Rule(op="*", weight="int4", input=text, output="int8[tensor]")
    check("linear", rule, OPTIONS["straight"], torch.bfloat16)
    if "tensor" in text:
        static = replace(rule, observer="minmax")
        check("conv2d", rule, OPTIONS["straight"], torch.float32)
        check("conv2d", static, OPTIONS["straight"], torch.float32)
        check("linear", static, OPTIONS["lsq"], torch.float32)
        check("linear", static, OPTIONS["lsq"], torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOG)
def test_activations_of_the_whole_catalog(name: str) -> None:
    torch.manual_seed(0)
    for grain in ("", "row", "tensor", "g16"):
        text = spelled(name, grain)
        if text is None or not takes(text, "linear"):
            continue
        for how in ("straight", "lsq"):
            check("linear", Rule(op="*", weight="int8", input=text), OPTIONS[how], torch.float32)
            data = format(text).scale is not None and format(text).scale.rule in ("absmean", "hqq")
            if grain == "tensor" and not data:
                rule = Rule(op="*", weight="int8", input=text, observer="minmax")
                check("linear", rule, OPTIONS[how], torch.float32)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(
        ["int4[g8]", "uint3[g8,zero]", "int2", "float6_e2m3", "nf4[g8]", "ternary[tensor]", "int8[4x8]"]
    ),
    st.sampled_from(["straight", "lsq", "smooth"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from(["", "int8", "float8_e4m3fn"]),
)
def test_random_shapes(
    text: str, how: str, dtype: torch.dtype, rows: int, cols: int, batch: int, activation: str
) -> None:
    torch.manual_seed(rows * 10 + cols)
    model = nn.Sequential(nn.Linear(8 * cols, 4 * rows), nn.GELU(), nn.Linear(4 * rows, 8)).to(dtype)
    rule = Rule(match="0", weight=text, input=activation)
    bf.prepare_qat(model, bf.Recipe("one", (rule,)), OPTIONS[how])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        step(model, torch.randn(4, 8 * cols, dtype=dtype), optimizer)
    model.eval()
    x = torch.randn(batch, 8 * cols, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        bf.convert(model, target="reference")
        assert torch.equal(model(x), expected)


class Net(nn.Module):
    """A head tied to a table, a linear that runs twice, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.fc = nn.Linear(32, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.lm_head = nn.Linear(32, 16, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.fc(torch.tanh(self.fc(x)))
        return self.lm_head(self.conv(x.transpose(1, 2)).transpose(1, 2))


TOKENS = torch.arange(20).reshape(4, 5) % 16
ALL = bf.Recipe("all", (Rule(op="*", weight="int4[g16]"),))


def loss(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())


def test_weights_stay_the_users_parameters() -> None:
    model = Net()
    before = dict(model.named_parameters())
    bf.prepare_qat(model, ALL, bf.Qat("lsq"))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {"embed.weight_step", "fc.weight_step", "conv.weight_step"}
    assert isinstance(model.fc, nn.Linear) and isinstance(model.embed, nn.Embedding)
    # A tied weight has one scale, as it will have one set of codes.
    assert model.lm_head.weight_step is model.embed.weight_step
    bf.convert(model)
    assert model.lm_head.codes is model.embed.codes


def test_scales_learn_at_their_own_rate_without_decay_and_stay_float32() -> None:
    model = Net().to(torch.bfloat16)
    bf.prepare_qat(model, ALL, bf.Qat("lsq"))
    model.to(torch.bfloat16)
    groups = bf.parameter_groups(model, lr=1e-2, scale_lr=1e-4, weight_decay=0.1)
    assert [group["lr"] for group in groups] == [1e-2, 1e-4] and groups[1]["weight_decay"] == 0.0
    assert {p.dtype for p in groups[1]["params"]} == {torch.float32}
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(list(model.parameters()))
    before = model.fc.weight_step.detach().clone()
    step(model, TOKENS, torch.optim.AdamW(groups))
    moved = (model.fc.weight_step - before).abs().max()
    assert 0 < moved <= 1.01e-4


def test_it_trains_and_the_gradient_of_a_plain_linear_is_straight_through() -> None:
    layer, x = nn.Linear(32, 8), torch.randn(4, 32)
    twin = copy.deepcopy(layer)
    bf.prepare_qat(nn.Sequential(layer), "int4[g16]")
    layer(x).square().sum().backward()
    with torch.no_grad():
        twin.weight.copy_(format("int4[g16]").fake_quantize(twin.weight))
    twin(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    torch.manual_seed(0)
    model = bf.prepare_qat(Net(), ALL, bf.Qat("lsq"))
    optimizer = torch.optim.Adam(bf.parameter_groups(model, 1e-2))
    first = loss(model).item()
    for _ in range(30):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(model).item() < 0.2 * first


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    whole = bf.prepare_qat(Net(), ALL, bf.Qat("lsq"))
    parts = copy.deepcopy(whole)
    loss(whole).backward()
    for half in TOKENS.split(2):
        (loss(parts, half) / 2).backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    how = bf.Qat("lsq+stochastic", "clip", observe=10)
    bf.prepare_qat(
        model, bf.Recipe("r", (Rule(weight="int4", input="int8[tensor]", observer="minmax"),)), how
    )
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    model(x).square().sum().backward()
    torch.manual_seed(1)
    checkpoint(twin, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    for (name, one), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other), name


def test_autocast_trains_and_converts_to_the_same_bits() -> None:
    torch.manual_seed(0)
    model = bf.prepare_qat(
        Net(), bf.Recipe("r", (Rule(op="*", weight="int4[g16]"), Rule(weight="int8", input="int8")))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            loss(model).backward()
            optimizer.step()
    assert model.fc.weight.grad.dtype == torch.float32
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(TOKENS)
        bf.convert(model, target="reference")
        assert expected.dtype == torch.bfloat16 and torch.equal(model(TOKENS), expected)


def test_adapters_train_on_a_prepared_layer_and_merge_into_it() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = bf.prepare_qat(Net(), "int4[g16]", bf.Qat("lsq"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc"], r=2, init_lora_weights=False))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    before = model.fc.base_layer.weight.detach().clone()
    for _ in range(3):
        loss(adapted).backward()
        optimizer.step()
    assert torch.equal(model.fc.base_layer.weight, before)  # LoRA freezes it
    beside = copy.deepcopy(adapted).eval()
    with torch.no_grad():
        expected = beside(TOKENS)
        bf.convert(beside, target="reference")
        assert torch.equal(beside(TOKENS), expected)
    merged = adapted.merge_and_unload().eval()
    assert isinstance(merged.fc, Prepared) and not torch.equal(merged.fc.weight, before)
    with torch.no_grad():
        expected = merged(TOKENS)
        bf.convert(merged, target="reference")
        assert torch.equal(merged(TOKENS), expected)


def test_fsdp2_shards_trains_and_gathers(tmp_path: object) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    plain = bf.prepare_qat(Net(), "int4[g16]", bf.Qat("lsq"))
    sharded = copy.deepcopy(plain)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(sharded.fc, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for model in (plain, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                loss(model).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert torch.equal(plain(TOKENS), sharded(TOKENS))
        with pytest.raises(bf.BitfoldError, match="sharded"):
            bf.convert(sharded)
        state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    finally:
        dist.destroy_process_group()
    again = bf.prepare_qat(Net(), "int4[g16]", bf.Qat("lsq"), state=state).eval()
    with torch.no_grad():
        expected = plain.eval()(TOKENS)
        bf.convert(again, target="reference")
        assert torch.equal(again(TOKENS), expected)


def test_a_copy_and_a_pickle_go_on_training() -> None:
    model = bf.prepare_qat(Net(), ALL, bf.Qat("lsq", observe=3))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        loss(twin).backward()
        assert twin.fc.weight.grad is not None and twin.fc.weight_step.grad is not None
        with torch.no_grad():
            expected = twin.eval()(TOKENS)
            assert torch.equal(bf.convert(twin, target="reference")(TOKENS), expected)


def test_ranges_follow_the_data_for_a_while_and_then_stand_still() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    recipe = bf.Recipe("r", (Rule(weight="int8", input="int8[tensor]", observer="minmax"),))
    bf.prepare_qat(model, recipe, bf.Qat(observe=3, rate=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    for size in (1.0, 3.0, 5.0, 100.0):
        x = torch.linspace(-size, size, 16).repeat(2, 1)
        model(x)  # accumulated with the next
        step(model, x, optimizer)
        seen.append(model[0].input_high.item())
    # The first range is the first batch's; then half the way, twice; then never again.
    assert seen == [1.0, 2.0, 3.5, 3.5] and model[0].input_low.item() == -3.5
    expected = model.eval()(x).detach()
    assert torch.equal(bf.convert(model, target="reference")(x), expected)


def test_warmup_trains_in_floats_and_eval_rounds() -> None:
    torch.manual_seed(0)
    model = Net()
    floats = copy.deepcopy(model)
    bf.prepare_qat(model, ALL, bf.Qat("lsq", warmup=2))
    for count in range(3):
        assert torch.equal(model(TOKENS), floats(TOKENS)) == (count < 2)
        assert not torch.equal(model.eval()(TOKENS), floats(TOKENS))
        model.train()
        bf.advance(model)


class Squared(nn.Module):
    """A forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        return F.linear(x * x, self.weight)


def test_a_module_with_a_forward_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Squared()), torch.randn(3, 16)
    bf.prepare_qat(model, "int4[g16]", bf.Qat("lsq"), example_inputs=(x,))
    step(model, x, torch.optim.SGD(model.parameters(), lr=0.1))
    expected = model.eval()(x).detach()
    assert torch.equal(bf.convert(model, target="reference")(x), expected)


def test_mistakes_are_one_sentence_and_change_nothing() -> None:
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = [
        (lambda: bf.prepare_qat(model, "int8_static"), "calibrat"),
        (lambda: bf.prepare_qat(model, "int8_static", bf.Qat(activation="lsq", observe=3)), "saw no data"),
        (lambda: bf.prepare_qat(model, "int8", bf.Qat("lsqq")), "lsq"),
        (lambda: bf.prepare_qat(model, "int8", "lsq"), "bf.Qat"),
        (lambda: bf.prepare_qat(model, "uint4[g16,zero]", bf.Qat("pact")), "zero point"),
        (lambda: bf.prepare_qat(model, "float8_e4m3fn[unscaled]", bf.Qat("lsq")), "no scale"),
        (lambda: bf.prepare_qat(model, "int4[g24]"), "24"),
        (lambda: bf.convert(model), "nothing"),
        (lambda: bf.advance(model), "nothing"),
    ]
    for call, says in wrong:
        with pytest.raises(bf.BitfoldError, match=says):
            call()
        assert type(model.fc) is nn.Linear
        assert set(before) == set(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    bf.prepare_qat(model, ALL, bf.Qat("lsq"))
    with pytest.raises(bf.BitfoldError, match="24"):
        bf.prepare_qat(model, "int4[g24]")
    assert isinstance(model.fc, Prepared) and isinstance(model.embed, Prepared)
    with torch.no_grad():
        model.fc.weight_step[0] = math.nan
    with pytest.raises(bf.BitfoldError, match="not finite"):
        bf.convert(model)
    assert isinstance(model.fc, Prepared) and isinstance(model.conv, Prepared)
    loss(model).backward()
    with torch.no_grad():
        model.fc.weight_step[0] = 1.0
    bf.convert(model)
    with pytest.raises(bf.BitfoldError, match="codes do not train"):
        bf.prepare_qat(model, ALL)


def test_a_range_without_data_is_not_converted() -> None:
    model = bf.prepare_qat(Net(), "int8_static", bf.Qat(observe=3))
    with pytest.raises(bf.BitfoldError, match="no data"):
        bf.convert(model)
    assert isinstance(model.fc, Prepared)


def test_fewer_bits_as_training_goes_on_with_the_same_optimizer() -> None:
    torch.manual_seed(0)
    recipes = [bf.Recipe("r", (Rule(op="*", weight=f"int{b}[g16]"),)) for b in (8, 4, 2)]
    model = bf.prepare_qat(Net(), recipes[0], bf.Qat("lsq", warmup=1))
    optimizer = torch.optim.Adam(bf.parameter_groups(model, 5e-3))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for recipe in recipes:
        if recipe is not recipes[0]:
            bf.prepare_qat(model, recipe, bf.Qat("lsq", warmup=1))
        assert {id(p) for p in model.parameters()} == trained
        for _ in range(5):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
            bf.advance(model)
    assert int(model.fc.clock) == 15
    model.eval()
    with torch.no_grad():
        expected = model(TOKENS)
        bf.convert(model, target="reference")
        assert torch.equal(model(TOKENS), expected)
    assert model.fc.folded_weights[0].format.startswith("int2[g16")


def test_ranges_go_on_when_bits_change() -> None:
    def static(bits: int) -> bf.Recipe:
        return bf.Recipe("r", (Rule(weight=f"int{bits}", input="int8[tensor]", observer="minmax"),))

    model = bf.prepare_qat(Net(), static(8), calibration=[TOKENS])
    high = model.fc.input_high.clone()
    bf.prepare_qat(model, static(4))
    assert torch.equal(model.fc.input_high, high) and bool(high.isfinite())


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_the_float_model_teaches_in_one_line(kind: str) -> None:
    torch.manual_seed(0)
    model = Net()
    floats = copy.deepcopy(model)
    names = set(model.state_dict())
    with pytest.raises(bf.BitfoldError, match="no teacher"):
        bf.distillation(model)
    bf.prepare_qat(model, ALL, distill=bf.Distill(kind, temperature=2.0, weight=3.0))
    assert set(model.state_dict()) == names and len(list(model.parameters())) == len(
        list(floats.parameters())
    )
    with pytest.raises(bf.BitfoldError, match="not been called"):
        bf.distillation(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        said = model(TOKENS)
        got = bf.distillation(model)
        with torch.no_grad():
            wanted = floats(TOKENS)
        if kind == "mse":
            assert torch.allclose(got, 3 * (said - wanted).square().mean())
        else:
            p, q = (torch.softmax(t.double() / 2, -1) for t in (wanted, said))
            by_hand = 3 * 4 * (p * (p.log() - q.log())).sum(-1).mean()
            assert torch.allclose(got.double(), by_hand, rtol=1e-4)  # logarithms of float32 near each other
        got.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(got.item())
    assert losses[-1] < 0.8 * losses[0]
    twin = copy.deepcopy(model)
    twin(TOKENS)
    bf.convert(twin)
    assert not twin._forward_hooks and "bitfold_teacher" not in twin.__dict__


def test_a_teacher_compiles_with_its_model() -> None:
    torch._dynamo.reset()
    model = bf.prepare_qat(Net(), ALL, distill=bf.Distill())
    step_ = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = (model(TOKENS), bf.distillation(model))[1]
    step_(TOKENS)
    got = bf.distillation(model)
    assert torch.allclose(got, expected, atol=1e-6)
    got.backward()
    assert model.fc.weight.grad is not None


def test_a_sparse_format_keeps_its_mask_in_training() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(4, 32)
    recipe = bf.Recipe("r", (Rule(weight="int4[g16,2:4]"),))
    with pytest.raises(bf.BitfoldError, match="sparse"):
        bf.prepare_qat(model, recipe, bf.Qat("lsq"))
    bf.prepare_qat(model, recipe)
    for _ in range(3):
        step(model, x, torch.optim.SGD(model.parameters(), lr=1.0))
    expected = model.eval()(x).detach()
    assert torch.equal(bf.convert(model, target="reference")(x), expected)


def test_a_weight_that_is_read_past_its_forward_is_left_and_reported() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return self.attention(x, x, x)[0]

    model, x = Attends(), torch.randn(2, 3, 16)
    bf.prepare_qat(model, "int8")
    assert isinstance(model.fc, Prepared) and not isinstance(model.attention.out_proj, Prepared)
    expected = model.eval()(x).detach()
    assert torch.equal(bf.convert(model, target="reference")(x), expected)
    assert any("without calling it" in str(miss) for miss in bf.report(model).misses)


@pytest.mark.parametrize("how", ["straight", "lsq"])
def test_experts_in_a_program(how: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 32, 16) / 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.weight)

    torch.manual_seed(0)
    x = torch.randn(2, 3, 32)
    gm = bf.prepare_qat(Experts(), "int4[g16]", OPTIONS[how], scope="program", example_inputs=(x,))
    step(gm, x, torch.optim.SGD(gm.parameters(), lr=0.1))
    expected = gm.eval()(x).detach()
    assert torch.equal(bf.convert(gm, target="reference")(x), expected)
