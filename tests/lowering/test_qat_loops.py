"""Training on rounded numbers in any loop: accumulation, checkpoints, autocast, adapters, shards."""

import copy
import io

import pytest
import torch
from qat_cases import ALL, TOKENS, Net, loss, step
from torch import nn
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
