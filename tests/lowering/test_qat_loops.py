"""Training on rounded numbers in any loop: accumulation, checkpoints, autocast, adapters, shards."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from qat_cases import ALL, OPTIONS, TOKENS, Net, loss, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bitfold as bf
from bitfold.formats import format
from bitfold.lowering.qat.prepared import Prepared
from bitfold.passes.rules import Rule


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
        pair = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4))
        bf.prepare_qat(pair, bf.Recipe("all", (Rule(op="*", weight="int4"),)))
        for apart in (*pair, pair):
            fully_shard(apart, mesh=mesh)
        with pytest.raises(bf.BitfoldError, match="take both in one unit"):
            pair(torch.randn(2, 4, 5))
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


@pytest.mark.parametrize("scope", ["module", "program"])
@pytest.mark.parametrize("gradient", ["lsq", "pact"])
def test_learned_scales_begin_at_the_weights_that_the_warmup_leaves(gradient: str, scope: str) -> None:
    """They are those of the same model, prepared only then; batch norm, tied weights and zero points too."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Net(), nn.Conv1d(5, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(112, 4))

    def prepared(model: nn.Module, warmup: int) -> nn.Module:
        text = "uint4[g16,zero]" if gradient == "lsq" else "int4[g16]"
        rules = Rule(op="*", weight=text), Rule(op="conv", weight="int4[row]")
        given = {"scope": scope} | ({"example_inputs": (TOKENS,)} if scope == "program" else {})
        how = bf.Qat(gradient, warmup=warmup, start="clip")
        return bf.prepare_qat(model, bf.Recipe("r", rules), how, **given).train()

    model = prepared(made(), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    learned = {name: p for name, p in model.named_parameters() if name.endswith(("_step", "_end", "_low"))}
    first = {name: p.detach().clone() for name, p in learned.items()}
    assert len(first) >= 4
    for _ in range(2):
        assert all(torch.equal(learned[name], numbers) for name, numbers in first.items())
        step(model, TOKENS, optimizer)
    fresh = made()
    names = set(fresh.state_dict())
    # A program names what is tied once.
    fresh.load_state_dict({name: t for name, t in model.state_dict().items() if name in names}, strict=False)
    fresh = prepared(fresh, 0)
    there = dict(fresh.named_parameters())
    assert all(torch.equal(p, there[name]) for name, p in learned.items())
    assert not any(torch.equal(p, first[name]) for name, p in learned.items())
    assert torch.equal(model.eval()(TOKENS), fresh.eval()(TOKENS))
    kept = {name: p.detach().clone() for name, p in learned.items()}
    bf.advance(model)
    assert all(torch.equal(learned[name], numbers) for name, numbers in kept.items())


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
        (
            lambda: bf.prepare_qat(model, "int8_static", bf.Qat(activation="lsq", observe=3)),
            "begins at a calibrated one",
        ),
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


def test_a_sparse_format_keeps_its_mask_in_training() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(4, 32)
    recipe = bf.Recipe("r", (Rule(weight="int4[g16,2:4]"),))
    with pytest.raises(bf.BitfoldError, match="sparse"):
        bf.prepare_qat(model, recipe, bf.Qat("lsq"))
    bf.prepare_qat(model, recipe)
    for _ in range(3):
        step(model, x, torch.optim.SGD(model.parameters(), lr=1.0))
    half, y = copy.deepcopy(model).to(torch.bfloat16), x.bfloat16()
    step(half, y, torch.optim.SGD(half.parameters(), lr=1.0))
    for one, given in ((model, x), (half, y)):
        expected = one.eval()(given).detach()
        assert torch.equal(bf.convert(one, target="reference")(given), expected)


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


class Block(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def test_layers_that_are_alike_are_compiled_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layers = [Block() for _ in range(4)]
    model = bf.prepare_qat(nn.Sequential(*layers), "int4[g16]", bf.Qat("lsq"))
    counter = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True)
    model(torch.randn(3, 16, requires_grad=True)).sum().backward()
    assert counter.frame_count == 1
